# SPDX-License-Identifier: Apache-2.0
"""What an optimizer step holds on a GPU, and what compiling it costs.

LLaMA shapes of 60M to 7B, one leaf a matrix, ranks of a sixteenth to a half of the
width (`aot.py`). The figures are XLA's buffer assignment for a card that need not be
there, and the seconds that this machine took. Whole training steps:
`plan_vs_compiler.py`.

    python -m benchmarks.memory.step_memory [--target rtx4090] [--models 60m] [--quick]

Needs the extra aot-cuda. Each program is kept as soon as it is compiled.
"""

import dataclasses
import warnings
from typing import Any

from benchmarks.lib import records
from benchmarks.lib.shapes import Shapes
from benchmarks.lib.subjects import ADAMW, EIGHT_BIT, GALORE, THEIRS, optimizer
from benchmarks.memory import aot, tables
from galore_optax import memory

MODELS = ("60m", "130m", "350m", "1b", "7b")
DIVISORS = (16, 8, 4, 2)
QUARTER = 4


@dataclasses.dataclass(frozen=True)
class Program:
    """One optimizer for one model."""

    model: str
    optimizer: str
    rank: int | None  # None where there is none

    def __str__(self) -> str:
        rank = "" if self.rank is None else f", rank {self.rank}"
        return f"{self.model}, {self.optimizer}{rank}"


def programs(model: str) -> list[Program]:
    width = Shapes.load(model).width
    return [
        Program(model, ADAMW, None),
        *(Program(model, GALORE, width // divisor) for divisor in DIVISORS),
        *(Program(model, name, width // QUARTER) for name in (EIGHT_BIT, THEIRS)),
    ]


def measure(program: Program, target: memory.Target) -> dict[str, Any]:
    """Bytes of the buffer assignment, and seconds of tracing and compiling."""
    tree = Shapes.load(program.model).tree()
    tx = optimizer(program.optimizer, program.rank or 1, 200)
    made = aot.compile_step(tx, tree, target)
    found = made.program.memory_analysis()
    print(f"compiled {program}", flush=True)
    return {
        "trace_seconds": made.trace_seconds,
        "compile_seconds": made.compile_seconds,
        "weights": memory.tree_bytes(made.params),
        "state": memory.tree_bytes(made.state),
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "not_donated": found.output_size_in_bytes - found.alias_size_in_bytes,
    }


def total(row: dict[str, Any]) -> int:
    """Bytes in all: arguments, temporaries, and outputs beyond donated arguments."""
    return row["arguments"] + row["temporaries"] + row["not_donated"]


def main() -> None:
    parser = records.parser(__doc__, quick=True)
    parser.add_argument("--target", default="rtx4090")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    target = aot.prepared(arguments.target)
    wanted = [program for model in arguments.models for program in programs(model)]
    runs = records.Runs(f"memory/step_memory_{target.name}")
    if arguments.quick:
        wanted, get = programs("60m")[:3], lambda key, make: make()
    else:
        get = runs.get
    found = [(x, get(str(x), lambda x=x: measure(x, target))) for x in wanted]
    rows = [dataclasses.asdict(x) | row | {"total": total(row)} for x, row in found]
    result = {"target": target.name, "rows": rows}
    print(tables.step_memory(result))
    missing = [f"{x}: not asked for" for x in MODELS if x not in arguments.models]
    records.write("memory/step_memory", result, missing, quick=arguments.quick)


if __name__ == "__main__":
    main()
