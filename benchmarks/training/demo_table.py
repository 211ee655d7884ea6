# SPDX-License-Identifier: Apache-2.0
"""The demo, recorded: perplexity, tokens per second and bytes of optimizer state.

python -m benchmarks.training.demo_table
"""

import tempfile
from pathlib import Path

from benchmarks.lib import common

import demo


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = demo.compare(demo.ADAMW.steps, demo.ADAMW.seed, Path(folder))
    rows = {
        name: {
            "perplexity": result.perplexity,
            "tokens_per_second": result.tokens_per_second,
            "state_bytes": result.state_bytes,
            "records": result.records,
        }
        for name, result in results.items()
    }
    first, *others = rows.values()
    speed = [row["tokens_per_second"] / first["tokens_per_second"] for row in others]
    print(f"tokens/s, GaLore over AdamW, refreshes included: {speed[0]:.2f}")
    common.write("training/demo", rows)


if __name__ == "__main__":
    main()
