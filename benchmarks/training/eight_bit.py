# SPDX-License-Identifier: Apache-2.0
"""Do moments in eight bits train as well as in f32, and what does a step cost?

The demo's run with GaLore, its moments in f32, in the dynamic code and in the companded
one; the same seed and tokens.

    python -m benchmarks.training.eight_bit
"""

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.lib import common

import demo
import metrics
from settings import Settings
from train import Trainer

F32 = dataclasses.replace(demo.GALORE, eval_every=100, eval_batches=64)


def coded(code: str) -> Settings:
    options = (*F32.options, f"code={code}")
    return dataclasses.replace(F32, optimizer="galore_adamw8bit", options=options)


RUNS = {"f32": F32, "dynamic": coded("dynamic"), "companded": coded("companded")}


def train(name: str, settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(settings, out=Path(folder))
        result = Trainer(run, name=name).train()
    speeds = metrics.series(result.records, "tokens_per_second")[1]
    return {
        "loss": metrics.series(result.records, "validation_loss")[1][-1],
        "tokens_per_second": statistics.median(speeds),
        "state_bytes": result.state_bytes,
    }


def main() -> None:
    found = {name: train(name, settings) for name, settings in RUNS.items()}
    exact = found["f32"]
    for name, row in found.items():
        print(
            f"{name:10} loss {row['loss']:.4f} ({row['loss'] / exact['loss'] - 1:+.2%})"
            f"  {row['tokens_per_second']:7,.0f} tokens/s"
            f"  {row['state_bytes']:12,} bytes"
        )
    common.write("training/eight_bit", found)


if __name__ == "__main__":
    main()
