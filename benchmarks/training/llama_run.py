# SPDX-License-Identifier: Apache-2.0
"""AdamW and GaLore on the full prose core: learning rates on a grid, then the runs.

The recorded run of `examples/llama/README.md`: the 9M configuration, one seed. Every
run goes on from its checkpoint, so an interrupted benchmark continues where it stopped.

    python -m benchmarks.training.llama_run [--model 9m --steps 450 --grid-steps 60]
"""

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

from benchmarks.lib import common

import metrics
from model import Config
from settings import Settings
from train import Trainer

BASE = {"corpus": "core", "tokens": 256, "batch": 16, "log_every": 10}
WEIGHT_DECAY = "weight_decay=0.01"
# AdamW's matrices at the rate of the rest, and at a quarter of it, as GaLore's scale
# makes it for GaLore.
GRID = {
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


def settings(choice: dict[str, Any], arguments: Any, steps: int, out: Path) -> Settings:
    options: tuple[str, ...] = (WEIGHT_DECAY,)
    if choice["optimizer"].startswith("galore"):
        rank = Config.load(arguments.model).width // 4
        options += (f"rank={rank}", "update_proj_gap=50")
    name = "_".join(f"{value}" for value in choice.values())
    return Settings(
        model=arguments.model,
        **BASE,
        **choice,
        options=options,
        steps=steps,
        eval_every=min(100, steps),
        checkpoint_every=min(100, steps),
        out=out / f"{steps}_{name}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="9m")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--grid-steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("out/llama_run"))
    arguments = parser.parse_args()
    grid, runs = {}, {}
    for name, choices in GRID.items():
        losses = {}
        for number, choice in enumerate(choices):
            run = settings(choice, arguments, arguments.grid_steps, arguments.out)
            records = Trainer(run, name=f"{name}, grid").train().records
            losses[number] = metrics.series(records, "validation_loss")[1][-1]
        grid[name] = [c | {"loss": losses[i]} for i, c in enumerate(choices)]
        best = choices[min(losses, key=lambda i: losses[i])]
        run = settings(best, arguments, arguments.steps, arguments.out)
        run = dataclasses.replace(run, eval_batches=64)
        result = Trainer(run, name=name).train()
        speeds = metrics.series(result.records, "tokens_per_second")[1]
        runs[name] = {
            **best,
            "tokens": run.steps * run.batch * run.tokens,
            "perplexity": result.perplexity,
            "tokens_per_second": statistics.median(speeds),
            "state_bytes": result.state_bytes,
            "records": result.records,
        }
    title = (
        f"LLaMA {arguments.model} on English prose, {runs['AdamW']['tokens']:,} tokens"
    )
    pictures = {name: run["records"] for name, run in runs.items()}
    picture = common.ROOT / "examples" / "llama" / f"curves_{arguments.model}.png"
    metrics.plot(pictures, picture, title)
    common.write(f"training/llama_{arguments.model}", {"grid": grid, "runs": runs})


if __name__ == "__main__":
    main()
