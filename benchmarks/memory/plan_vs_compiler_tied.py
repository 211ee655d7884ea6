# SPDX-License-Identifier: Apache-2.0
"""The same as `plan_vs_compiler`, of models whose head is the embedding.

python -m benchmarks.memory.plan_vs_compiler_tied

Needs the extra aot-cuda, and no device.
"""

from benchmarks.lib import records
from benchmarks.memory import tables
from benchmarks.memory.plan_vs_compiler import compare, layerwise, never, rank
from benchmarks.memory.targets import target as target_of
from galore_optax.memory import Method, Setting

ADAMW, GALORE = Method("adamw"), rank("galore_adamw8bit", 512)
SMALL = rank("galore_adamw8bit", 256)
CASES = (
    ("llama-3.2-1b", ADAMW, Setting(256, remat=True)),
    ("llama-3.2-1b", ADAMW, Setting(2048, remat=True)),
    ("llama-3.2-1b", ADAMW, Setting(256, accumulation=4, remat=True)),
    ("llama-3.2-1b", GALORE, Setting(256, remat=True)),
    ("llama-3.2-1b", GALORE, layerwise(256)),
    ("llama-3.2-1b", GALORE, layerwise(2048)),
    ("llama-3.2-1b", GALORE, layerwise(256, accumulation=4)),
    ("llama-3.2-1b", GALORE, never(256)),
    ("llama-3.2-1b", GALORE, never(2048)),
    ("qwen2.5-0.5b", ADAMW, Setting(1024, remat=True)),
    ("qwen2.5-0.5b", SMALL, layerwise(1024)),
    ("qwen2.5-0.5b", SMALL, layerwise(512, accumulation=2)),
)


def main() -> None:
    records.parser(__doc__).parse_args()
    target = target_of("rtx4090")
    target.prepare()
    rows = [compare(*case, target) for case in CASES]
    found = {"target": target.name, "rows": rows}
    print(tables.plan_vs_compiler(found))
    records.write("memory/plan_vs_compiler_tied", found)


if __name__ == "__main__":
    main()
