# SPDX-License-Identifier: Apache-2.0
"""Does the default subspace method train as well as the exact one?

First the learning rate of each optimizer on a grid, one seed; then, at the chosen
rates, AdamW and GaLore with the default method and with exact SVD over seeds. Every
run is stored as soon as it ends, so an interrupted benchmark goes on where it stopped.

    python benchmarks/demo_seeds.py [--seeds 3]
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import common

import demo
import metrics
from settings import Settings
from train import Trainer

GRID = {
    "AdamW": (demo.ADAMW, (1.25e-3, 2.5e-3, 5e-3)),
    "AdamW at one rate": (
        dataclasses.replace(demo.ADAMW, matrix_rate=1.0),
        (5e-4, 1e-3, 2e-3),
    ),
    "GaLore": (demo.GALORE, (2.5e-3, 5e-3, 1e-2)),
}


def train(key: str, settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(settings, out=Path(folder))
        records = Trainer(run, name=key).train().records
    loss = metrics.series(records, "validation_loss")[1][-1]
    print(f"{key}: validation loss {loss:.4f}", flush=True)
    return {"loss": loss}


class Losses:
    """Final validation losses, of runs made now or on record."""

    def __init__(self, steps: int):
        self.runs, self.steps = common.Runs("demo_seeds"), steps

    def __call__(self, name: str, settings: Settings, rate: float, seed: int) -> float:
        key = f"{name}, {self.steps} steps, lr {rate:g}, seed {seed}"
        run = dataclasses.replace(
            settings,
            learning_rate=rate,
            seed=seed,
            steps=self.steps,
            eval_every=self.steps,
            eval_batches=64,
        )
        return self.runs.get(key, lambda: train(key, run))["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=demo.ADAMW.steps)
    arguments = parser.parse_args()
    loss = Losses(arguments.steps)
    best, grid = {}, {}
    for name, (settings, rates) in GRID.items():
        found = {rate: loss(name, settings, rate, 0) for rate in rates}
        grid[name] = {f"{rate:g}": value for rate, value in found.items()}
        best[name] = min(found, key=lambda rate: found[rate])
    svd = dataclasses.replace(
        demo.GALORE, options=(*demo.GALORE.options, "subspace=svd")
    )
    rows = {
        "AdamW": ("AdamW", demo.ADAMW, best["AdamW"]),
        "GaLore, default": ("GaLore", demo.GALORE, best["GaLore"]),
        "GaLore, svd": ("GaLore svd", svd, best["GaLore"]),
    }
    seeds = range(arguments.seeds)
    losses = {
        row: [loss(*choice, seed) for seed in seeds] for row, choice in rows.items()
    }
    for row, values in losses.items():
        print(f"{row:18} mean {np.mean(values):.4f} spread {np.ptp(values):.4f}")
    common.write(
        "demo_seeds",
        {
            "steps": arguments.steps,
            "learning_rates": best,
            "final_validation_loss": losses,
            "grid": grid,
        },
    )


if __name__ == "__main__":
    main()
