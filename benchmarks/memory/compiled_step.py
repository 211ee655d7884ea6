# SPDX-License-Identifier: Apache-2.0
"""What XLA makes of an optimizer step on a GPU: kernels, loops, arrays, bytes.

bf16 LLaMA shapes with one leaf for all layers (`aot.py`). `steady` has no refresh in
it, `refresh` renews every projector. A conditional, and a loop whose turns the compiler
cannot count, make the device wait for the host, each turn of the loop anew.

    python -m benchmarks.memory.compiled_step [--model 7b] [--label before] [--quick]

Needs the extra aot-cuda. Counts of two commits are compared by running it at both.
"""

import dataclasses
import warnings
from typing import Any

from benchmarks.lib import records
from benchmarks.lib.shapes import Shapes
from benchmarks.lib.subjects import ADAMW, EIGHT_BIT, GALORE, OURS, optimizer
from benchmarks.memory import aot, tables
from benchmarks.memory.hlo import Program
from galore_optax import memory

TARGETS = ("rtx4090", "h200")
NAMES = {ADAMW: ADAMW, "galore(adam)": OURS, GALORE: GALORE, EIGHT_BIT: EIGHT_BIT}


@dataclasses.dataclass(frozen=True)
class Case:
    """One program."""

    target: str
    optimizer: str
    refresh: bool

    def __str__(self) -> str:
        kind = "refresh" if self.refresh else "steady"
        return f"{self.target}, {self.optimizer}, {kind}"


def cases(targets: list[str]) -> list[Case]:
    return [
        Case(target, optimizer, refresh)
        for target in targets
        for optimizer in NAMES
        for refresh in (False, True)
        if optimizer != ADAMW or not refresh
    ]


def compile_case(case: Case, shapes: Shapes, rank: int) -> dict[str, Any]:
    """Counts of the program compiled for the target of `case`."""
    tx = optimizer(NAMES[case.optimizer], rank, 200)
    target, tree = memory.target(case.target), shapes.stacked()
    compiled = aot.compile_step(tx, tree, target, refresh=case.refresh).program
    found = compiled.memory_analysis()
    print(f"compiled {case}", flush=True)
    return {
        **counts(Program.parse(compiled.as_text()), projected(shapes)),
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }


def projected(shapes: Shapes) -> set[tuple[int, ...]]:
    """Shapes of the leaves that are matrices."""
    layers = shapes.stacked()["layers"]
    return {
        node["kernel"] for part in ("attn", "mlp") for node in layers[part].values()
    }


def counts(program: Program, leaves: set[tuple[int, ...]]) -> dict[str, Any]:
    """Those kernels apart that write arrays of the shape of a projected leaf."""
    return {
        "kernels": sum(line.is_kernel for line in program),
        "products": sum(line.is_product for line in program),
        "conditionals": program.count("conditional"),
        "loops": [dataclasses.asdict(loop) for loop in program.loops()],
        "f32_arrays_of_leaf_size": len(program.arrays("f32", leaves)),
        "bf16_arrays_of_leaf_size": len(program.arrays("bf16", leaves)),
    }


def main() -> None:
    parser = records.parser(__doc__, quick=True)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--model", default="7b")
    parser.add_argument("--label", default="", help="of the record, beside others")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    aot.prepared(arguments.targets[0])
    model = "60m" if arguments.quick else arguments.model
    shapes = Shapes.load(model)
    rank = shapes.width // 4
    wanted = cases(arguments.targets)
    rows = {str(case): compile_case(case, shapes, rank) for case in wanted}
    result = {"model": model, "rank": rank, "rows": rows}
    print(tables.compiled_step(result))
    name = "_".join(filter(None, ("memory/compiled_step", arguments.label)))
    records.write(name, result, quick=arguments.quick)


if __name__ == "__main__":
    main()
