# SPDX-License-Identifier: Apache-2.0
"""Does the default subspace method train as well as the exact one?

First the learning rate of each optimizer on a grid, one seed; then, at the chosen
rates, AdamW and GaLore with the default method and with exact SVD over seeds. Every
run is stored as soon as it ends, so an interrupted benchmark goes on where it stopped.

    python benchmarks/demo_seeds.py [--seeds 3]
"""

import argparse
import functools
import json
from typing import Any

import numpy as np

import common
from galore_optax import subspace

import data
import demo
from train import Run, train

GRID = {
    "AdamW": (demo.adamw, (1.25e-3, 2.5e-3, 5e-3)),
    "AdamW at one rate": (
        functools.partial(demo.adamw, matrices=1.0),
        (5e-4, 1e-3, 2e-3),
    ),
    "GaLore": (demo.galore, (2.5e-3, 5e-3, 1e-2)),
}


class Runs:
    """Final validation losses by name, kept in a file."""

    def __init__(self, steps: int):
        self.path = common.RESULTS / f"demo_runs_{steps}.partial.json"
        self.losses = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.corpus = data.load(Run().model.vocab)
        self.steps = steps

    def loss(self, name: str, make: Any, seed: int) -> float:
        key = f"{name}, seed {seed}"
        if key not in self.losses:
            run = Run(
                steps=self.steps, seed=seed, eval_every=self.steps, eval_batches=64
            )
            history = train(self.corpus, make, run, key)
            self.losses[key] = history.eval_loss[-1]
            self.path.parent.mkdir(exist_ok=True)
            self.path.write_text(json.dumps(self.losses, indent=1))
            print(f"{key}: validation loss {self.losses[key]:.4f}", flush=True)
        return self.losses[key]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=Run.steps)
    arguments = parser.parse_args()
    runs = Runs(arguments.steps)
    best = {}
    for name, (make, rates) in GRID.items():
        found = {
            rate: runs.loss(f"{name}, lr {rate:g}", make(rate), 0) for rate in rates
        }
        best[name] = min(found, key=lambda rate: found[rate])
    rows = {
        "AdamW": (f"AdamW, lr {best['AdamW']:g}", demo.adamw(best["AdamW"])),
        "GaLore, default": (
            f"GaLore, lr {best['GaLore']:g}",
            demo.galore(best["GaLore"]),
        ),
        "GaLore, svd": ("GaLore svd", demo.galore(best["GaLore"], subspace.svd())),
    }
    seeds = range(arguments.seeds)
    losses = {
        row: [runs.loss(name, make, seed) for seed in seeds]
        for row, (name, make) in rows.items()
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
                k: v for k, v in runs.losses.items() if "lr" in k and "seed 0" in k
            },
        },
    )
    runs.path.unlink()


if __name__ == "__main__":
    main()
