# SPDX-License-Identifier: Apache-2.0
"""One training step of LLaMA-7B, optimizer by optimizer: the picture of the README.

python -m benchmarks.memory.step_7b       # compiles, in .venv-cuda, and records
python -m benchmarks.memory.draw_step_7b  # draws the record
"""

from benchmarks.lib import front_tables, records
from benchmarks.memory.plan_vs_compiler import compare, rank
from benchmarks.memory.targets import target as target_of
from galore_optax.memory import Method, Setting

MODEL, TOKENS, TARGET = "7b", 2048, "rtx4090"
GALORE = rank("galore_adamw8bit", 1024)
PLAIN = Setting(TOKENS, remat=True)
LAYERWISE = Setting(TOKENS, remat=True, layerwise=True)
NEVER = Setting(TOKENS, remat=True, gradients="never")
CASES = (
    (Method("adamw"), PLAIN),
    (Method("adamw8bit"), PLAIN),
    (Method("adafactor"), PLAIN),
    (GALORE, PLAIN),
    (GALORE, NEVER),
    (GALORE, LAYERWISE),
    (Method("adamw8bit"), LAYERWISE),
    (Method("adafactor"), LAYERWISE),
)


def main() -> None:
    records.parser(__doc__).parse_args()
    target = target_of(TARGET)
    target.prepare()
    rows = [compare(MODEL, *case, target) for case in CASES]
    found = {"card": target.memory, "target": TARGET, "rows": rows}
    records.write("memory/step_7b", found)
    print(front_tables.step_7b(found, records.load("speed/gpu_h200_first")))


if __name__ == "__main__":
    main()
