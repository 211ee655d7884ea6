# SPDX-License-Identifier: Apache-2.0
"""Does the default subspace method train as well as the exact one?

First the learning rate of each optimizer on a grid, one seed; then, at the chosen
rates, AdamW and GaLore with the default method and with exact SVD over seeds. Every
run is stored as soon as it ends, so an interrupted benchmark goes on where it stopped.

    python benchmarks/demo_seeds.py [--seeds 3]
"""

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

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


class Runs:
    """Final validation losses by name, kept in a file."""

    def __init__(self, steps: int):
        self.path = common.RESULTS / f"demo_runs_{steps}.partial.json"
        self.losses = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.steps = steps

    def loss(self, name: str, settings: Settings, rate: float, seed: int) -> float:
        key = f"{name}, lr {rate:g}, seed {seed}"
        if key not in self.losses:
            self.losses[key] = self._train(key, settings, rate, seed)
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(self.losses, indent=1))
            print(f"{key}: validation loss {self.losses[key]:.4f}", flush=True)
        return self.losses[key]

    def _train(self, key: str, settings: Settings, rate: float, seed: int) -> float:
        with tempfile.TemporaryDirectory() as folder:
            run = dataclasses.replace(
                settings,
                learning_rate=rate,
                seed=seed,
                steps=self.steps,
                eval_every=self.steps,
                eval_batches=64,
                out=Path(folder),
            )
            records = Trainer(run, name=key).train().records
        return metrics.series(records, "validation_loss")[1][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=demo.ADAMW.steps)
    arguments = parser.parse_args()
    runs = Runs(arguments.steps)
    best = {}
    for name, (settings, rates) in GRID.items():
        found = {rate: runs.loss(name, settings, rate, 0) for rate in rates}
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
        row: [runs.loss(*choice, seed) for seed in seeds]
        for row, choice in rows.items()
    }
    for row, values in losses.items():
        print(f"{row:18} mean {np.mean(values):.4f} spread {np.ptp(values):.4f}")
    common.write(
        "demo_seeds",
        {
            "steps": runs.steps,
            "learning_rates": best,
            "final_validation_loss": losses,
            "grid": {
                k: v for k, v in runs.losses.items() if "svd" not in k and "seed 0" in k
            },
        },
    )
    runs.path.unlink()


if __name__ == "__main__":
    main()
