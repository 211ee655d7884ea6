# SPDX-License-Identifier: Apache-2.0
"""Does the default subspace method train as well as the exact one?

First the learning rate of each optimizer on a grid that grows at its edges, one seed,
and for AdamW that of its matrices too: a quarter of the rate, which is GaLore's scale,
or a sixteenth. Then, at the best of them, AdamW and GaLore with the default method and
with exact SVD over seeds. Every run is stored as soon as it ends, so an interrupted
benchmark goes on where it stopped.

    python -m benchmarks.training.demo_seeds [--seeds 3]
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib import common, tuning

import demo
import metrics
from settings import Settings
from train import Trainer

ADAMW = {
    f"AdamW, matrices at {ratio:g}": dataclasses.replace(demo.ADAMW, matrix_rate=ratio)
    for ratio in (1 / 4, 1 / 16)
}
SETTINGS = {**ADAMW, "GaLore": demo.GALORE}
START = dict(zip(SETTINGS, (-3, -1, -2), strict=True))  # least k of rates 0.01 * 2^k


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
        self.runs, self.steps = common.Runs("training/demo_seeds"), steps

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


Loss = Callable[[str, Settings, float, int], float]


def tuned(name: str, loss: Loss) -> dict[float, float]:
    """Losses of seed 0 by learning rate."""
    found: dict[int, float] = {}
    while wanted := tuning.wanted(found, range(START[name], START[name] + 3)):
        found |= {k: loss(name, SETTINGS[name], rate(k), 0) for k in wanted}
    return {rate(k): found[k] for k in sorted(found)}


def rate(exponent: int) -> float:
    return 0.01 * 2.0**exponent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=demo.ADAMW.steps)
    arguments = parser.parse_args()
    loss = Losses(arguments.steps)
    grid = {name: tuned(name, loss) for name in SETTINGS}
    best = {name: min(found, key=found.__getitem__) for name, found in grid.items()}
    adamw = min(ADAMW, key=lambda name: grid[name][best[name]])
    svd = dataclasses.replace(
        demo.GALORE, options=(*demo.GALORE.options, "subspace=svd")
    )
    rows = {
        "AdamW": (adamw, ADAMW[adamw], best[adamw]),
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
        "training/demo_seeds",
        {
            "steps": arguments.steps,
            "learning_rates": best,
            "matrix_rate_of_adamw": ADAMW[adamw].matrix_rate,
            "final_validation_loss": losses,
            "grid": {
                name: {f"{rate:g}": value for rate, value in found.items()}
                for name, found in grid.items()
            },
        },
    )


if __name__ == "__main__":
    main()
