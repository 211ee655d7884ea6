# SPDX-License-Identifier: Apache-2.0
"""What XLA makes of an optimizer step on a GPU that need not be there.

    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)

as one program, bf16 LLaMA shapes, weights and state donated.

    python -m benchmarks.memory.compiled_step bytes [--quick]
    python -m benchmarks.memory.compiled_step kernels [--label before] [--quick]

`bytes`: what it holds by buffer assignment, 60M to 7B, one leaf a matrix, ranks of a
sixteenth to a half of the width, and the seconds that tracing and compiling took.
`kernels`: kernels, loops and arrays of 7B's, one leaf for all layers; `steady` has no
refresh in it, `refresh` renews every projector. A conditional, and a loop whose turns
the compiler cannot count, make the device wait for the host, each turn of the loop
anew. Counts of two commits are compared by running it at both.

Needs the extra aot-cuda. Whole training steps: `plan_vs_compiler`.
"""

import dataclasses
import sys
import warnings
from typing import Any

import jax

from benchmarks.lib import records
from benchmarks.lib.shapes import Shapes, abstract
from benchmarks.lib.subjects import (
    ADAMW,
    EIGHT_BIT,
    GALORE,
    OURS,
    THEIRS,
    applied,
    optimizer,
    timed,
)
from benchmarks.memory import hlo, tables
from benchmarks.memory.assignment import OPTIONS
from benchmarks.memory.targets import target as target_of
from galore_optax import memory

TARGETS = ("rtx4090", "h200")
MODELS = ("60m", "130m", "350m", "1b", "7b")
DIVISORS = (16, 8, 4, 2)
QUARTER = 4
NAMES = {ADAMW: ADAMW, "galore(adam)": OURS, GALORE: GALORE, EIGHT_BIT: EIGHT_BIT}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program, the bytes that it was given, and the seconds of making it."""

    program: Any
    weights: int
    state: int
    trace_seconds: float
    compile_seconds: float


def compile_step(name: str, rank: int, tree: Any, target: str, **extra: Any) -> Any:
    """The step of an optimizer; `extra` are arguments of its update."""
    tx, card = optimizer(name, rank, 200), target_of(target)
    sharding = jax.sharding.SingleDeviceSharding(card.device())
    params = abstract(tree)
    state = jax.eval_shape(tx.init, params)
    given = params, state, params
    placed = jax.tree.map(lambda x: x.update(sharding=sharding), given)
    step = jax.jit(applied(tx, **extra), donate_argnums=(0, 1))
    trace_seconds, lowered = timed(
        lambda: step.trace(*placed).lower(lowering_platforms=(card.platform,))
    )
    seconds, program = timed(lambda: lowered.compile(compiler_options=OPTIONS["cuda"]))
    sizes = map(memory.tree_bytes, (params, state))
    return Compiled(program, *sizes, trace_seconds, seconds)


@dataclasses.dataclass(frozen=True)
class Held:
    """One program whose bytes are read."""

    model: str
    optimizer: str
    rank: int | None  # None where there is none

    def __str__(self) -> str:
        rank = "" if self.rank is None else f", rank {self.rank}"
        return f"{self.model}, {self.optimizer}{rank}"

    def measure(self) -> dict[str, Any]:
        tree = Shapes.load(self.model).tree()
        made = compile_step(self.optimizer, self.rank or 1, tree, TARGETS[0])
        found = made.program.memory_analysis()
        print(f"compiled {self}", flush=True)
        return {
            **{k: v for k, v in vars(made).items() if k != "program"},
            "arguments": found.argument_size_in_bytes,
            "temporaries": found.temp_size_in_bytes,
            "not_donated": found.output_size_in_bytes - found.alias_size_in_bytes,
        }


def held(model: str) -> list[Held]:
    width = Shapes.load(model).width
    return [
        Held(model, ADAMW, None),
        *(Held(model, GALORE, width // divisor) for divisor in DIVISORS),
        *(Held(model, name, width // QUARTER) for name in (EIGHT_BIT, THEIRS)),
    ]


def total(row: dict[str, Any]) -> int:
    """Bytes in all: arguments, temporaries, and outputs beyond donated arguments."""
    return row["arguments"] + row["temporaries"] + row["not_donated"]


def measure_bytes(quick: bool) -> None:
    wanted = [program for model in MODELS for program in held(model)]
    runs = records.Runs(f"memory/step_memory_{TARGETS[0]}")
    if quick:
        rows = [x.measure() for x in wanted[:3]]
    else:
        rows = [runs.get(str(x), x.measure) for x in wanted]
    rows = [
        dataclasses.asdict(x) | row | {"total": total(row)}
        for x, row in zip(wanted, rows, strict=False)
    ]
    found = {"target": TARGETS[0], "rows": rows}
    print(tables.step_memory(found))
    records.write("memory/step_memory", found, quick=quick)


@dataclasses.dataclass(frozen=True)
class Counted:
    """One program whose kernels are counted."""

    target: str
    optimizer: str
    refresh: bool

    def __str__(self) -> str:
        kind = "refresh" if self.refresh else "steady"
        return f"{self.target}, {self.optimizer}, {kind}"

    def measure(self, shapes: Shapes, rank: int) -> dict[str, Any]:
        name, extra = NAMES[self.optimizer], {"refresh": self.refresh}
        made = compile_step(name, rank, shapes.stacked(), self.target, **extra)
        found = made.program.memory_analysis()
        print(f"compiled {self}", flush=True)
        return {
            **counts(hlo.Program.parse(made.program.as_text()), projected(shapes)),
            "arguments": found.argument_size_in_bytes,
            "temporaries": found.temp_size_in_bytes,
        }


def counted() -> list[Counted]:
    return [
        Counted(target, name, refresh)
        for target in TARGETS
        for name in NAMES
        for refresh in (False, True)
        if name != ADAMW or not refresh
    ]


def projected(shapes: Shapes) -> set[tuple[int, ...]]:
    """Shapes of the leaves that are matrices."""
    layers = shapes.stacked()["layers"]
    return {
        node["kernel"] for part in ("attn", "mlp") for node in layers[part].values()
    }


def counts(program: hlo.Program, leaves: set[tuple[int, ...]]) -> dict[str, Any]:
    """Those kernels apart that write arrays of the shape of a projected leaf."""
    return {
        "kernels": sum(line.is_kernel for line in program),
        "products": sum(line.is_product for line in program),
        "conditionals": program.count("conditional"),
        "loops": [dataclasses.asdict(loop) for loop in program.loops()],
        "f32_arrays_of_leaf_size": len(program.arrays("f32", leaves)),
        "bf16_arrays_of_leaf_size": len(program.arrays("bf16", leaves)),
    }


def count_kernels(quick: bool, label: str) -> None:
    model = "60m" if quick else "7b"
    shapes = Shapes.load(model)
    rank = shapes.width // QUARTER
    rows = {str(case): case.measure(shapes, rank) for case in counted()}
    found = {"model": model, "rank": rank, "rows": rows}
    print(tables.compiled_step(found))
    name = "_".join(filter(None, ("memory/compiled_step", label)))
    records.write(name, found, quick=quick)


def main() -> None:
    parser = records.parser(__doc__, quick=True)
    parser.add_argument("part", choices=("bytes", "kernels"))
    parser.add_argument("--label", default="", help="of the record, beside others")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    target = target_of(TARGETS[0])
    target.prepare()
    try:
        target.device()
    except RuntimeError as error:
        sys.exit(f"skipped, nothing is recorded: {error}")
    if arguments.part == "bytes":
        measure_bytes(arguments.quick)
    else:
        count_kernels(arguments.quick, arguments.label)


if __name__ == "__main__":
    main()
