# SPDX-License-Identifier: Apache-2.0
"""What an optimizer step holds on a GPU, and what compiling it costs.

LLaMA shapes of 60M to 7B, one leaf a matrix, bf16 weights and gradients, ranks of a
sixteenth to a half of the width; update and `apply_updates` in one program, weights and
state donated. The figures are XLA's buffer assignment for a card that need not be
there, and the seconds that this machine took. Whole training steps:
`plan_vs_compiler.py`.

    python -m benchmarks.memory.step_memory [--target rtx4090] [--models 60m] [--quick]

Needs the extra aot-cuda. Each program is kept as soon as it is compiled.
"""

import dataclasses
import time
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from benchmarks.lib import common, recording
from benchmarks.lib.subjects import Shapes
from galore_optax import memory

MODELS = ("60m", "130m", "350m", "1b", "7b")
DIVISORS = (16, 8, 4, 2)
OPTIONS = {"xla_gpu_autotune_level": 0}  # nothing can be timed without the device


@dataclasses.dataclass(frozen=True)
class Program:
    """One optimizer for one model."""

    model: str
    optimizer: str
    rank: int | None  # None where there is none

    def transformation(self) -> optax.GradientTransformation:
        if self.rank is None:
            return optax.adamw(1e-3)
        make = {
            "galore_adamw": galore_optax.galore_adamw,
            "galore_adamw8bit": galore_optax.galore_adamw8bit,
            "optax.contrib.galore": optax.contrib.galore,
        }
        return make[self.optimizer](1e-3, rank=self.rank)

    def __str__(self) -> str:
        rank = "" if self.rank is None else f", rank {self.rank}"
        return f"{self.model}, {self.optimizer}{rank}"


def programs(models: list[str]) -> list[Program]:
    found = []
    for model in models:
        ranks = [Shapes.load(model).width // divisor for divisor in DIVISORS]
        found.append(Program(model, "optax.adamw", None))
        found += [Program(model, "galore_adamw", rank) for rank in ranks]
        quarter = ranks[DIVISORS.index(4)]
        found.append(Program(model, "galore_adamw8bit", quarter))
        found.append(Program(model, "optax.contrib.galore", quarter))
    return found


def compile_step(program: Program, target: memory.Target) -> dict[str, Any]:
    """Bytes of the buffer assignment, and seconds of tracing and compiling."""
    tx = program.transformation()
    sharding = jax.sharding.SingleDeviceSharding(target.device())

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = _shapes(program.model)
    arguments = placed((params, jax.eval_shape(tx.init, params), params))
    start = time.perf_counter()
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(*arguments)
    lowered = traced.lower(lowering_platforms=(target.platform,))
    middle = time.perf_counter()
    found = lowered.compile(compiler_options=OPTIONS).memory_analysis()
    return {
        "trace_seconds": middle - start,
        "compile_seconds": time.perf_counter() - middle,
        "weights": memory.tree_bytes(params),
        "state": memory.tree_bytes(arguments[1]),
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "not_donated": found.output_size_in_bytes - found.alias_size_in_bytes,
    }


def _shapes(model: str) -> Any:
    tree = Shapes.load(model).tree()
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16),
        tree,
        is_leaf=lambda x: type(x) is tuple,
    )


def total(row: dict[str, Any]) -> int:
    """Bytes in all: arguments, temporaries, and outputs beyond donated arguments."""
    return row["arguments"] + row["temporaries"] + row["not_donated"]


def line(program: Program, row: dict[str, Any]) -> str:
    parts = [row[x] / 1e9 for x in ("weights", "state", "temporaries")]
    cells = "".join(f"{part:10.3f}" for part in (*parts, total(row) / 1e9))
    seconds = row["trace_seconds"], row["compile_seconds"]
    return f"{program!s:40}{cells}" + "".join(f"{x:9.1f}" for x in seconds)


def run(target: memory.Target, asked: list[str]) -> tuple[list[Any], list[str]]:
    """Rows, and what is missing."""
    runs = common.Runs(f"memory/step_memory_{target.name}")
    rows = []
    for program in programs(asked):
        row = runs.get(str(program), lambda p=program: compile_step(p, target))
        print(line(program, row), flush=True)
        rows.append(dataclasses.asdict(program) | row | {"total": total(row)})
    return rows, [f"{x}: not asked for" for x in MODELS if x not in asked]


def main() -> None:
    parser = recording.parser(__doc__)
    parser.add_argument("--target", default="rtx4090")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    target = memory.target(arguments.target)
    target.prepare()
    try:
        target.device()
    except RuntimeError as error:
        print(f"skipped, nothing is recorded: {error}")
        return
    columns = "".join(f"{x:>10}" for x in ("weights", "state", "temp.", "total"))
    print(f"{'GB, seconds':40}{columns}{'trace':>9}{'compile':>9}")
    if arguments.quick:
        for program in programs(["60m"])[:3]:
            print(line(program, compile_step(program, target)), flush=True)
        return
    rows, missing = run(target, arguments.models)
    result = {"target": target.name, "rows": rows}
    recording.write(False, "memory/step_memory", result, missing)


if __name__ == "__main__":
    main()
