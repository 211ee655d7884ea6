# SPDX-License-Identifier: Apache-2.0
"""Does LLaMA-7B train in 24 GB? The example's program, its process limited to so much.

Every row is a process of its own, limited by XLA_PYTHON_CLIENT_MEM_FRACTION; what does
not fit runs again without a limit, to see what it takes. A GPU is needed for a limit
and for the peak; without one the rows run all the same, at the size given, and say so.

    python -m benchmarks.memory.limited_memory [--model 7b --budget 24 --steps 12]
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.lib import common

TRAIN = common.ROOT / "examples" / "llama" / "train.py"
LOW = ("--options", "rank={rank}", "update_proj_gap=8", "--layerwise")
ROWS: dict[str, tuple[str, ...]] = {
    "8-bit GaLore, layerwise, 256 tokens": ("--optimizer", "galore_adamw8bit", *LOW),
    "8-bit GaLore, layerwise, 2048 tokens": (
        *("--optimizer", "galore_adamw8bit", *LOW),
        *("--batch", "8"),
    ),
    "8-bit Adam, gradients kept, 256 tokens": ("--optimizer", "adamw8bit"),
    "AdamW, bf16, gradients kept, 256 tokens": ("--optimizer", "adamw"),
}
SHARED = (
    *("--tokens", "256", "--batch", "1", "--clip", "0", "--remat"),
    *("--compute-dtype", "bfloat16", "--params-dtype", "bfloat16"),
    *("--log-every", "1", "--eval-every", "0", "--learning-rate", "1e-4"),
)


def run(
    name: str, extra: tuple[str, ...], arguments: Any, fraction: float | None
) -> dict[str, Any]:
    """One process; what it measured, or why it ended."""
    slug = "".join(c if c.isalnum() else "_" for c in f"{name}_{fraction}")
    out = arguments.out / slug
    rank = common.width(arguments.model) // 4
    command = [
        *(sys.executable, str(TRAIN), "--model", arguments.model, "--out", str(out)),
        *("--steps", str(arguments.steps), *SHARED),
        *(word.format(rank=rank) for word in extra),
    ]
    limit = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{fraction:.4f}"} if fraction else {}
    done = subprocess.run(command, env=os.environ | limit, capture_output=True)
    if done.returncode:
        text = done.stderr.decode(errors="replace")
        full = "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
        if not full:
            raise SystemExit(f"{name} failed:\n{text[-3000:]}")
        return {"fits": False}
    return {"fits": True} | measured(out)


def measured(out: Path) -> dict[str, Any]:
    import metrics

    records = metrics.read(out / "metrics.jsonl")
    peaks = metrics.series(records, "peak_bytes")[1]
    speeds = metrics.series(records, "tokens_per_second")[1]
    return {
        "peak_gb": max(peaks) / 1e9 if peaks else None,
        "tokens_per_second": statistics.median(speeds),
        "loss": metrics.series(records, "loss")[1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="7b")
    parser.add_argument("--budget", type=float, default=24.0, help="GB of the device")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("out/limited_memory"))
    arguments = parser.parse_args()
    total = common.device_bytes()
    fraction = arguments.budget * 1e9 / total if total else None
    if fraction is None:
        print("no accelerator: neither limited nor measured, the rows only run")
    rows = {}
    for name, extra in ROWS.items():
        found = run(name, extra, arguments, fraction)
        if not found["fits"]:
            found["without_limit"] = run(name, extra, arguments, None)
        rows[name] = found
        print(f"{name}: { ({k: v for k, v in found.items() if k != 'loss'}) }")
    if fraction is None:
        print("nothing is recorded: the figures of memory need an accelerator")
        return
    result = {"model": arguments.model, "budget_gb": arguments.budget, "rows": rows}
    common.write(f"memory/limited_memory_{arguments.model}", result)


if __name__ == "__main__":
    main()
