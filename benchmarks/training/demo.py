# SPDX-License-Identifier: Apache-2.0
"""The demo's runs: what it prints, which rates suit it, and what seeds change.

    python -m benchmarks.training.demo table  # as `make demo` prints it
    python -m benchmarks.training.demo seeds  # is the default method as good as SVD?
    python -m benchmarks.training.demo 9m     # a larger model, for examples/llama

`seeds`: the learning rate of each optimizer on a grid that grows at its edges, one
seed, and for AdamW that of its matrices too: a quarter of the rate, which is GaLore's
scale, or a sixteenth. Then, at the best of them, AdamW and GaLore with the default
method and with exact SVD over seeds. `9m`: the rates on a grid of short runs, then the
runs. Every run is stored as soon as it ends; what was interrupted goes on.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from benchmarks.lib import records
from benchmarks.training import runs, tables

import demo
import metrics
from model import Config
from settings import Settings

ADAMW = {
    f"AdamW, matrices at {ratio:g}": dataclasses.replace(demo.ADAMW, matrix_rate=ratio)
    for ratio in (1 / 4, 1 / 16)
}
SETTINGS = {**ADAMW, "GaLore": demo.GALORE}
START = dict(zip(SETTINGS, (-3, -1, -2), strict=True))  # least k of rates 0.01 · 2^k
SEEDS = range(3)
Loss = Callable[[str, Settings, float, int], float]


def table() -> None:
    found = {
        name: runs.shown(runs.train(dataclasses.replace(settings), name))
        for name, settings in demo.RUNS.items()
    }
    print(tables.demo(found))
    records.write("training/demo", found)


def seeds() -> None:
    kept = records.Runs("training/demo_seeds")

    def loss(name: str, settings: Settings, rate: float, seed: int) -> float:
        steps = settings.steps
        key = f"{name}, {steps} steps, lr {rate:g}, seed {seed}"
        told = {"learning_rate": rate, "seed": seed, "eval_every": steps}
        run = dataclasses.replace(settings, **told, eval_batches=64)
        return kept.get(key, lambda: runs.kept(runs.train(run, key)))["loss"]

    found = compared(loss)
    print(tables.demo_seeds(found))
    records.write("training/demo_seeds", found)


def grid_of(name: str, loss: Loss) -> runs.Losses:
    return runs.tuned(START[name], lambda rate: loss(name, SETTINGS[name], rate, 0))


def compared(loss: Loss) -> dict[str, Any]:
    """Grids, and the losses of every seed at the best of them."""
    grid = {name: grid_of(name, loss) for name in SETTINGS}
    best = {name: min(found, key=found.__getitem__) for name, found in grid.items()}
    adamw = min(ADAMW, key=lambda name: grid[name][best[name]])
    options = (*demo.GALORE.options, "subspace=svd")
    svd = dataclasses.replace(demo.GALORE, options=options)
    rows = {
        "AdamW": (adamw, ADAMW[adamw], best[adamw]),
        "GaLore, default": ("GaLore", demo.GALORE, best["GaLore"]),
        "GaLore, svd": ("GaLore svd", svd, best["GaLore"]),
    }
    return {
        "steps": demo.ADAMW.steps,
        "learning_rates": best,
        "matrix_rate_of_adamw": ADAMW[adamw].matrix_rate,
        "final_validation_loss": {
            row: [loss(*choice, seed) for seed in SEEDS] for row, choice in rows.items()
        },
        "grid": {
            name: {f"{rate:g}": value for rate, value in losses.items()}
            for name, losses in grid.items()
        },
    }


# AdamW's matrices at the rate of the rest, and at a quarter of it, as GaLore's scale
# makes it for GaLore.
LARGER = {
    "AdamW": [
        {"optimizer": "adamw", "learning_rate": rate, "matrix_rate": matrices}
        for rate in (1e-3, 2e-3, 4e-3)
        for matrices in (1.0, 0.25)
    ],
    "GaLore": [
        {"optimizer": "galore_adamw", "learning_rate": rate}
        for rate in (2.5e-3, 5e-3, 1e-2)
    ],
}


def larger(model: str = "9m", steps: int = 450, grid_steps: int = 60) -> None:
    kept, grid, found = records.Runs(f"training/llama_{model}"), {}, {}

    def run(name: str, choice: dict[str, Any], steps: int) -> dict[str, Any]:
        settings = larger_settings(model, choice, steps)
        key = f"{name}, {steps} steps, {choice}"

        def make() -> dict[str, Any]:
            result = runs.train(settings, key)
            return runs.kept(result) | runs.shown(result)

        return kept.get(key, make)

    for name, choices in LARGER.items():
        grid[name] = [c | {"loss": run(name, c, grid_steps)["loss"]} for c in choices]
        best = min(grid[name], key=lambda choice: choice["loss"])
        best = {k: v for k, v in best.items() if k != "loss"}
        found[name] = best | run(name, best, steps)
    result = {"grid": grid, "runs": found}
    print(tables.llama_9m(result))
    picture = records.ROOT / "examples" / "llama" / f"curves_{model}.png"
    curves = {name: row["records"] for name, row in found.items()}
    metrics.plot(curves, picture, f"LLaMA {model} on English prose")
    records.write(f"training/llama_{model}", result, runs=kept)


def larger_settings(model: str, choice: dict[str, Any], steps: int) -> Settings:
    options = ["weight_decay=0.01"]
    if choice["optimizer"].startswith("galore"):
        options += [f"rank={Config.load(model).width // 4}", "update_proj_gap=50"]
    often = {"eval_every": min(100, steps), "log_every": 10, "eval_batches": 64}
    size = {"corpus": "core", "tokens": 256, "batch": 16, "steps": steps}
    return Settings(model=model, options=tuple(options), **choice, **size, **often)


PARTS = {"table": table, "seeds": seeds, "9m": larger}


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    for part in parser.parse_args().parts:
        PARTS[part]()


if __name__ == "__main__":
    main()
