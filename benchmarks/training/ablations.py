# SPDX-License-Identifier: Apache-2.0
"""What do rank, gap, subspace method, side, staggering and dtypes change?

A small LLaMA on real text, several seeds of every setting; Figure 5 of the paper and
the claims beside it. One learning rate for all: the one that `pretraining.py` found
best for GaLore with this scale in this model. Every run is stored as soon as it ends,
so an interrupted benchmark goes on where it stopped.

    python -m benchmarks.training.ablations [--minutes 30] [--list]
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.lib import records
from benchmarks.lib.paired import difference
from benchmarks.training import draw, runs, tables

import demo
from settings import Settings

NEVER = 2**30  # a gap that no run is as long as
SEEDS = range(3)
WIDTH = 128
BASE = dataclasses.replace(
    demo.GALORE, model="1m", steps=300, learning_rate=0.02, options=(), eval_batches=32
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What runs differ in; `options` are those of the optimizer."""

    rank: int
    gap: int = demo.GAP
    optimizer: str = "galore_adamw"
    options: tuple[tuple[str, Any], ...] = ()
    rate: float = 1.0  # times the base's

    def __str__(self) -> str:
        gap = "never" if self.gap >= NEVER else self.gap
        options = [f"{name}={value}" for name, value in self.options]
        options += [] if self.rate == 1 else [f"rate x {self.rate:g}"]
        name = [] if self.optimizer == "galore_adamw" else [self.optimizer]
        return ", ".join([*name, f"rank={self.rank}", f"gap={gap}", *options])

    def run(self, seed: int) -> Settings:
        low = f"rank={self.rank}", f"update_proj_gap={self.gap}", "weight_decay=0.01"
        return dataclasses.replace(
            BASE,
            optimizer=self.optimizer,
            options=(*low, *(f"{name}={value}" for name, value in self.options)),
            learning_rate=self.rate * BASE.learning_rate,
            eval_every=BASE.steps,
            seed=seed,
        )


USUAL = Setting(rank=WIDTH // 4)  # the demo's, which every study contains
GAPS = (10, 50, 200, NEVER)
GRID = "rank and gap"


def grid() -> dict[str, Setting]:
    """Ranks by gaps, Figure 5; at the usual rank also a refresh at every step."""
    ranks = [WIDTH // share for share in (16, 8, 4, 2)]
    settings = [Setting(rank, gap) for rank in ranks for gap in GAPS]
    settings.append(Setting(USUAL.rank, gap=1))
    return {str(setting): setting for setting in settings}


def vary(option: str, default: Any, *others: Any) -> dict[str, Setting]:
    changed = {
        str(x): dataclasses.replace(USUAL, options=((option, x),)) for x in others
    }
    return {str(default): USUAL, **changed}


# Settings by study and by name; the first of a study is what it compares with.
STUDIES = {
    GRID: grid(),
    "learning rate": {
        f"whole, rank {USUAL.rank}": USUAL,
        **{f"half, rank {r}": Setting(r, rate=0.5) for r in (USUAL.rank, WIDTH // 2)},
    },
    "subspace": vary("subspace", "power", "randomized", "eigh", "svd", "random"),
    "proj_type": vary("proj_type", "std", "reverse_std", "left", "right", "full"),
    "stagger": vary("stagger", False, True),
    "projector_dtype": vary("projector_dtype", "float32", "bfloat16", "int8", "int4"),
    "moments": vary("moment_dtype", "float32", "bfloat16")
    | {
        f"8 bits, {code}": dataclasses.replace(
            USUAL, optimizer="galore_adamw8bit", options=(("code", code),)
        )
        for code in ("companded", "dynamic")
    },
}


def planned() -> list[Setting]:
    """Every setting once."""
    return list(dict.fromkeys(x for study in STUDIES.values() for x in study.values()))


def key(setting: Setting) -> str:
    size = f"width {WIDTH}, {BASE.steps} steps of {BASE.batch} x {BASE.tokens}"
    rest = f"{BASE.eval_batches} held out, lr {BASE.learning_rate:g}"
    return f"{size}, {rest}, {len(SEEDS)} seeds: {setting}"


def train(setting: Setting) -> dict[str, Any]:
    """Final validation loss of every seed."""
    found = [runs.kept(runs.train(setting.run(x), f"{setting}, {x}")) for x in SEEDS]
    losses = [run["loss"] for run in found]
    return {"losses": losses, "state_bytes_a_seed": found[0]["state_bytes"]}


def rows(settings: dict[str, Setting], found: Any) -> Iterator[Any]:
    """What is on record of a study: a row a setting, against the first of them."""
    usual = found.get(key(USUAL))
    for name, setting in settings.items():
        run = found.get(key(setting))
        if run is None or usual is None:
            continue
        losses = run["losses"]
        yield {
            "name": name,
            "rank": setting.rank,
            "gap": "never" if setting.gap >= NEVER else setting.gap,
            "losses": losses,
            "mean": float(np.mean(losses)),
            "spread": float(np.ptp(losses)),
            "less_base": difference(losses, usual["losses"]).record(),
            "state_bytes_a_seed": run["state_bytes_a_seed"],
        }


def figure_5(table: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rank by rank: the best gap, and what the extremes lose against it.

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
            "too_frequent": _against_best(losses, min(losses, key=draw.order)),
            "too_rare": _against_best(losses, max(losses, key=draw.order)),
        }
    return found


def _best(losses: dict[Any, Sequence[float]]) -> Any:
    return min(losses, key=lambda gap: np.mean(losses[gap]))


def _against_best(losses: dict[Any, Sequence[float]], gap: Any) -> dict[str, Any]:
    others = {other: found for other, found in losses.items() if other != gap}
    best = _best(others)
    less = difference(losses[gap], others[best])
    return {"gap": gap, "best_other": best} | less.record()


def result(found: Mapping[str, Any]) -> dict[str, Any]:
    by_study = {k: list(rows(x, found)) for k, x in STUDIES.items()}
    told = "steps", "batch", "tokens", "eval_batches", "learning_rate", "corpus"
    return {
        "recipe": {name: getattr(BASE, name) for name in told}
        | {"config": dataclasses.asdict(BASE.config), "seeds": len(SEEDS)},
        "base": str(USUAL),
        "grid": GRID,
        "studies": by_study,
        "figure_5": figure_5(by_study[GRID]),
    }


def main() -> None:
    parser = records.parser(__doc__)
    limit = {"type": float, "default": math.inf}
    parser.add_argument("--minutes", **limit, help="start no later")
    parser.add_argument("--list", action="store_true", help="what there is to run")
    arguments = parser.parse_args()
    kept = records.Runs("training/ablations")
    plan = {key(x): lambda x=x: train(x) for x in planned()}
    if arguments.list:
        records.show_list(kept, plan)
        return
    missing = kept.fill(plan, arguments.minutes)
    found = result(kept.found)
    for table in (tables.ablations, tables.ablations_grid, tables.figure_5):
        print(table(found))
    records.write("training/ablations", found, missing, kept)
    if not missing:
        draw.ablations(found)


if __name__ == "__main__":
    main()
