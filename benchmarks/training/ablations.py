# SPDX-License-Identifier: Apache-2.0
"""What do rank, gap, subspace method, side, staggering and dtypes change?

A small LLaMA on real text, several seeds of every setting under one compile by vmap;
Figure 5 of the paper and the claims beside it. One learning rate for all: the one that
`pretraining.py` found best for GaLore with this scale in a model of this width. Every
run is stored as soon as it ends, so an interrupted benchmark goes on where it stopped.

    python -m benchmarks.training.ablations [--minutes 30] [--list]
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.lib import common, pictures
from benchmarks.lib.paired import Difference, difference
from benchmarks.training import draw_ablations
from benchmarks.training.vmapped import NEVER, Recipe, Setting, seconds_a_step, train

import data
from model import Config

GAPS = (10, 50, 200, NEVER)
EVERY_STEP = 1
SHARES = (16, 8, 4, 2)  # rank: the width divided by
METHODS = ("power", "randomized", "eigh", "svd", "random")
SIDES = ("std", "reverse_std", "left", "right", "full")
PROJECTORS = ("float32", "bfloat16", "int8", "int4")
TIMING = "one step of all seeds"
GRID = "rank and gap"

Studies = dict[str, dict[str, Setting]]


def base(width: int) -> Setting:
    """The demo's setting, which every study contains."""
    return Setting(rank=width // 4)


def grid(width: int) -> dict[str, Setting]:
    """Ranks by gaps, Figure 5; at the usual rank also a refresh at every step."""
    ranks = [width // share for share in SHARES]
    settings = [Setting(rank=rank, gap=gap) for rank in ranks for gap in GAPS]
    settings.append(dataclasses.replace(base(width), gap=EVERY_STEP))
    return {str(setting): setting for setting in settings}


def studies(width: int) -> Studies:
    """Settings by study and by name; the first of a study is what it compares with."""
    usual = base(width)

    def vary(option: str, values: Sequence[Any]) -> dict[str, Setting]:
        first, *others = values
        changed = {
            x: dataclasses.replace(usual, options=((option, x),)) for x in others
        }
        return {str(x): setting for x, setting in {first: usual, **changed}.items()}

    def coded(code: str) -> Setting:
        return dataclasses.replace(
            usual, optimizer="galore_adamw8bit", options=(("code", code),)
        )

    def slower(rank: int) -> Setting:
        return dataclasses.replace(usual, rank=rank, rate=0.5)

    ranks = {f"half, rank {rank}": slower(rank) for rank in (usual.rank, width // 2)}
    moments = vary("moment_dtype", ("float32", "bfloat16"))
    codes = {f"8 bits, {code}": coded(code) for code in ("companded", "dynamic")}
    return {
        GRID: grid(width),
        "learning rate": {f"whole, rank {usual.rank}": usual, **ranks},
        "subspace": vary("subspace", METHODS),
        "proj_type": vary("proj_type", SIDES),
        "stagger": vary("stagger", (False, True)),
        "projector_dtype": vary("projector_dtype", PROJECTORS),
        "moments": moments | codes,
    }


def unique(found: Studies) -> list[Setting]:
    """Every setting once; those that share a program come one after the other."""
    settings = dict.fromkeys(s for study in found.values() for s in study.values())
    programs = list(dict.fromkeys(dataclasses.replace(s, gap=0) for s in settings))
    return sorted(settings, key=lambda s: programs.index(dataclasses.replace(s, gap=0)))


def key(recipe: Recipe, setting: Setting | str) -> str:
    told = (
        f"width {recipe.config.width}",
        f"{recipe.steps} steps of {recipe.batch} x {recipe.tokens}",
        f"{recipe.eval_batches} held out",
        f"lr {recipe.learning_rate:g}",
        f"{recipe.seeds} seeds",
    )
    return f"{', '.join(told)}: {setting}"


class Deadline:
    """Whether another run may be started."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    @property
    def passed(self) -> bool:
        return time.monotonic() > self.end


def run_all(
    recipe: Recipe, settings: Sequence[Setting], runs: common.Runs, deadline: Deadline
) -> None:
    corpus = data.load("prose", recipe.config.vocab)
    for setting in settings:
        name = key(recipe, setting)
        if name in runs.found or deadline.passed:
            continue
        found = runs.get(name, lambda s=setting: train(recipe, s, corpus))
        losses = " ".join(f"{loss:.4f}" for loss in found["losses"])
        print(f"{setting}: {losses}  ({found['seconds']:.0f} s)", flush=True)
    if not deadline.passed:
        usual = base(recipe.config.width)
        runs.get(key(recipe, TIMING), lambda: seconds_a_step(recipe, usual, corpus, 12))


def rows(recipe: Recipe, settings: dict[str, Setting], found: Any) -> Iterator[Any]:
    """What is on record of a study: a row a setting, against the first of them."""
    usual = found.get(key(recipe, base(recipe.config.width)))
    for name, setting in settings.items():
        run = found.get(key(recipe, setting))
        if run is None or usual is None:
            continue
        losses = run["losses"]
        yield {
            "name": name,
            "rank": setting.rank,
            "gap": gap_name(setting.gap),
            "losses": losses,
            "mean": float(np.mean(losses)),
            "spread": float(np.ptp(losses)),
            "less_base": compared(losses, usual["losses"]),
            "state_bytes_a_seed": run["state_bytes_a_seed"],
        }


def compared(losses: Sequence[float], others: Sequence[float]) -> dict[str, Any]:
    return difference(losses, others).record()


def gap_name(gap: int) -> int | str:
    return "never" if gap >= NEVER else gap


def claims(table: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figure 5, rank by rank: the best gap, and what the extremes lose against it.

    An extreme is compared with the best of the other gaps; more than 0 means that it
    hurts. Ranks with runs still missing are left out.
    """
    found = {}
    for rank in sorted({row["rank"] for row in table}):
        losses = {row["gap"]: row["losses"] for row in table if row["rank"] == rank}
        if len(losses) < len(GAPS):
            continue
        found[str(rank)] = {
            "best_gap": _best(losses),
            "too_frequent": _against_best(
                losses, min(losses, key=draw_ablations.order)
            ),
            "too_rare": _against_best(losses, max(losses, key=draw_ablations.order)),
        }
    return found


def _best(losses: dict[Any, Sequence[float]]) -> Any:
    return min(losses, key=lambda gap: np.mean(losses[gap]))


def _against_best(losses: dict[Any, Sequence[float]], gap: Any) -> dict[str, Any]:
    others = {other: found for other, found in losses.items() if other != gap}
    best = _best(others)
    return {"gap": gap, "best_other": best} | compared(losses[gap], others[best])


def result(recipe: Recipe, runs: common.Runs) -> dict[str, Any]:
    usual = base(recipe.config.width)
    tables = {
        study: list(rows(recipe, settings, runs.found))
        for study, settings in studies(recipe.config.width).items()
    }
    return {
        "recipe": dataclasses.asdict(recipe) | {"corpus": "prose"},
        "base": str(usual),
        "grid": GRID,
        "studies": tables,
        "figure_5": claims(tables[GRID]),
        "seconds_a_step": runs.found.get(key(recipe, TIMING)),
    }


def report(found: dict[str, Any]) -> None:
    for study, table in found["studies"].items():
        print(f"\n{study}: validation loss, spread over seeds, less that of the base")
        for row in table:
            numbers = f"{row['mean']:.4f}  {row['spread']:.4f}"
            print(f"  {row['name']:28} {numbers}  {said(row['less_base'])}")
    for rank, claim in found["figure_5"].items():
        print(f"\nrank {rank}: best gap {claim['best_gap']}")
        for less in (claim["too_frequent"], claim["too_rare"]):
            print(f"  gap {less['gap']} less gap {less['best_other']}: {said(less)}")
    if found["seconds_a_step"]:
        ratio = found["seconds_a_step"]["ratio"]
        print(f"\na step of all seeds at once over one after the other: {ratio:.2f}")


def said(less: dict[str, Any]) -> str:
    return str(Difference(less["mean"], less["low"], less["high"]))


def parse() -> tuple[Recipe, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="start no later"
    )
    parser.add_argument("--list", action="store_true", help="what there is to run")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=128, help="of the model")
    parser.add_argument("--learning-rate", type=float, default=0.02)
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds must be at least 2, or there is no spread.")
    width, usual = arguments.width, Config.load("demo")
    hidden = usual.hidden * width // usual.width
    config = dataclasses.replace(usual, width=width, hidden=hidden)
    recipe = Recipe(
        config, arguments.steps, arguments.seeds, learning_rate=arguments.learning_rate
    )
    return recipe, arguments


def main() -> None:
    recipe, arguments = parse()
    runs = common.Runs("training/ablations")
    planned = [*unique(studies(recipe.config.width)), TIMING]
    if arguments.list:
        for setting in planned:
            done = key(recipe, setting) in runs.found
            print(f"{'on record' if done else 'to be run'}  {setting}")
        return
    run_all(recipe, planned[:-1], runs, Deadline(arguments.minutes))
    missing = [
        f"{setting}: still to be run"
        for setting in planned
        if key(recipe, setting) not in runs.found
    ]
    found = result(recipe, runs)
    report(found)
    common.write("training/ablations", found, missing, runs)
    if missing:
        print("not drawn: runs are missing")
    else:
        draw_ablations.draw(pictures.read("training/ablations")["result"])


if __name__ == "__main__":
    main()
