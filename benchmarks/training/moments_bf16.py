# SPDX-License-Identifier: Apache-2.0
"""What should the dtype of moments be where weights have 16 bits?

The demo in bf16, weights and computation, at the rates that suit it in f32: AdamW as
Optax has it, with bf16 moments, and with f32 ones; GaLore with f32 moments of projected
leaves alone, its default, with all moments in f32, and with all in bf16. Same seeds,
initialisation and tokens, so that differences are taken seed by seed. Every run is
stored as soon as it ends, so that an interrupted benchmark goes on where it stopped;
several processes share the runs.

    python -m benchmarks.training.moments_bf16 [--minutes 30] [--list]
"""

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib import common
from benchmarks.lib.paired import difference
from benchmarks.training.ablations import Deadline

import demo
import metrics
from settings import Settings
from train import Trainer

BF16 = {"params_dtype": "bfloat16", "compute_dtype": "bfloat16"}
ADAMW, GALORE = "optax.adamw", "galore_adamw"


def in_bf16(base: Settings, *options: str) -> Settings:
    return dataclasses.replace(base, options=(*base.options, *options), **BF16)


SETTINGS = {
    ADAMW: in_bf16(demo.ADAMW),
    f"{ADAMW}, f32 moments": in_bf16(demo.ADAMW, "moment_dtype=float32"),
    GALORE: in_bf16(demo.GALORE),
    f"{GALORE}, all f32": in_bf16(demo.GALORE, "moment_dtype=float32"),
    f"{GALORE}, all bf16": in_bf16(demo.GALORE, "moment_dtype=bfloat16"),
}
BASES = {name: GALORE if name.startswith(GALORE) else ADAMW for name in SETTINGS}


def train(key: str, settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(settings, out=Path(folder))
        result = Trainer(run, name=key).train()
    loss = metrics.series(result.records, "validation_loss")[1][-1]
    print(f"{key}: validation loss {loss:.4f}", flush=True)
    return {"loss": loss, "state_bytes": result.state_bytes}


def key(name: str, steps: int, seed: int) -> str:
    return f"{name}, {steps} steps, seed {seed}"


def planned(steps: int, seeds: int) -> dict[str, Settings]:
    """Every run by its key; a seed of all settings before the next seed."""
    return {
        key(name, steps, seed): dataclasses.replace(
            settings, steps=steps, seed=seed, eval_every=steps, eval_batches=64
        )
        for seed in range(seeds)
        for name, settings in SETTINGS.items()
    }


def run_all(runs: common.Runs, plan: Mapping[str, Settings], minutes: float) -> None:
    """Runs what is not on record; what another process is at is left to it."""
    deadline = Deadline(minutes)
    for name, settings in plan.items():
        taken = name in runs.found or runs.made_elsewhere(name)
        if not (taken or deadline.passed):
            runs.get(name, lambda name=name, run=settings: train(name, run))


def rows(found: Mapping[str, Any], steps: int, seeds: int) -> dict[str, Any]:
    """A row for each setting of which every seed is on record."""
    made = {}
    for name in SETTINGS:
        runs = [found.get(key(name, steps, seed)) for seed in range(seeds)]
        if all(runs):
            made[name] = row(runs)
    for name, one in made.items():
        base = BASES[name]
        if name != base and base in made and seeds > 1:
            one["less_base"] = difference(one["losses"], made[base]["losses"]).record()
    return made


def row(runs: Sequence[Any]) -> dict[str, Any]:
    losses = [run["loss"] for run in runs]
    mean = float(np.mean(losses))
    return {
        "losses": losses,
        "mean": mean,
        "perplexity": math.exp(mean),
        "state_bytes": runs[0]["state_bytes"],
    }


def show(found: Mapping[str, Any]) -> None:
    for name, one in found.items():
        less = one.get("less_base")
        told = f"  less {BASES[name]}'s {less['mean']:+.4f}" if less else ""
        size = f"{one['state_bytes']:,} bytes"
        print(f"{name:28}{one['mean']:8.4f}{one['perplexity']:8.1f}  {size:>20}{told}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=demo.ADAMW.steps)
    parser.add_argument("--seeds", type=int, default=3)
    limit = {"type": float, "default": math.inf}
    parser.add_argument("--minutes", **limit, help="start no run later")
    parser.add_argument("--list", action="store_true", help="what there is to run")
    arguments = parser.parse_args()
    runs = common.Runs("training/moments_bf16")
    plan = planned(arguments.steps, arguments.seeds)
    if arguments.list:
        for name in plan:
            print(f"{'on record' if name in runs.found else 'to be run'}  {name}")
        return
    run_all(runs, plan, arguments.minutes)
    missing = [f"{name}: still to be run" for name in plan if name not in runs.found]
    found = rows(runs.found, arguments.steps, arguments.seeds)
    show(found)
    result = {"steps": arguments.steps, "seeds": arguments.seeds, "rows": found}
    common.write("training/moments_bf16", result, missing, runs)


if __name__ == "__main__":
    main()
