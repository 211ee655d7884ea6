# SPDX-License-Identifier: Apache-2.0
"""What XLA makes of an optimizer step on a GPU: kernels, loops, arrays, bytes.

    updates, state = tx.update(gradients, state, params, refresh=False or True)
    params = optax.apply_updates(params, updates)

as one program, weights and state donated, for bf16 LLaMA shapes with one leaf for all
layers, compiled for cards that need not be there. `steady` has no refresh in it,
`refresh` renews every projector. A conditional, and a loop whose turns the compiler
cannot count, make the device wait for the host, each turn of the loop anew.

    python -m benchmarks.memory.compiled_step [--model 7b] [--label before] [--quick]

Needs the extra aot-cuda. Counts of two commits are compared by running it at both.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import jax
import optax

import galore_optax
from benchmarks.lib import recording
from benchmarks.lib.gpu_shapes import abstract, stacked
from benchmarks.lib.subjects import Shapes
from benchmarks.memory.hlo import Program
from galore_optax import memory

OPTIONS = {"xla_gpu_autotune_level": 0}  # nothing can be timed without the device
OPTIMIZERS: dict[str, Callable[[int], optax.GradientTransformation]] = {
    "optax.adamw": lambda rank: optax.adamw(1e-3),
    "galore(adam)": lambda rank: galore_optax.galore(optax.adam(1e-3), rank=rank),
    "galore_adamw": lambda rank: galore_optax.galore_adamw(1e-3, rank=rank),
    "galore_adamw8bit": lambda rank: galore_optax.galore_adamw8bit(1e-3, rank=rank),
}
TARGETS = ("rtx4090", "h200")


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
        for optimizer in OPTIMIZERS
        for refresh in (False, True)
        if optimizer != "optax.adamw" or not refresh
    ]


def compile_case(case: Case, shapes: Shapes, rank: int) -> dict[str, Any]:
    """Counts of the program compiled for the target of `case`."""
    target = memory.target(case.target)
    sharding = jax.sharding.SingleDeviceSharding(target.device())
    tx = OPTIMIZERS[case.optimizer](rank)
    params = abstract(stacked(shapes))
    arguments = params, jax.eval_shape(tx.init, params), params
    placed = jax.tree.map(lambda x: x.update(sharding=sharding), arguments)
    traced = jax.jit(step(tx, case.refresh), donate_argnums=(0, 1)).trace(*placed)
    lowered = traced.lower(lowering_platforms=(target.platform,))
    compiled = lowered.compile(compiler_options=OPTIONS)
    found = compiled.memory_analysis()
    return {
        **counts(Program.parse(compiled.as_text()), projected(shapes)),
        "arguments": found.argument_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }


def step(tx: optax.GradientTransformation, refresh: bool) -> Callable[..., Any]:
    update = optax.with_extra_args_support(tx).update

    def advance(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = update(gradients, state, params, refresh=refresh)
        return optax.apply_updates(params, updates), state

    return advance


def projected(shapes: Shapes) -> set[tuple[int, ...]]:
    """Shapes of the leaves that are matrices."""
    layers = stacked(shapes)["layers"]
    return {
        node["kernel"] for part in ("attn", "mlp") for node in layers[part].values()
    }


def counts(program: Program, leaves: set[tuple[int, ...]]) -> dict[str, Any]:
    """Those kernels apart that write arrays of the shape of a projected leaf."""
    loops = program.loops()
    return {
        "kernels": sum(line.is_kernel for line in program),
        "products": sum(line.is_product for line in program),
        "conditionals": program.count("conditional"),
        "loops": [dataclasses.asdict(loop) for loop in loops],
        "f32_arrays_of_leaf_size": len(program.arrays("f32", leaves)),
        "bf16_arrays_of_leaf_size": len(program.arrays("bf16", leaves)),
        "moved_of_leaf_size": len(program.moved(leaves)),
    }


def line(name: str, row: dict[str, Any]) -> str:
    loops = " ".join(
        f"{'.' * loop['depth']}{loop['trips'] or '?'}x{loop['kernels']}"
        for loop in row["loops"]
    )
    numbers = [v for v in row.values() if isinstance(v, int)]
    *small, arguments, temporaries = numbers
    cells = "".join(f"{number:9}" for number in small)
    sizes = "".join(f"{size / 1e9:9.3f}" for size in (arguments, temporaries))
    return f"{name:38}{cells}{sizes}  {loops}"


def main() -> None:
    parser = recording.parser(__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--model", default="7b")
    parser.add_argument("--label", default="", help="of the record, beside others")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    memory.target(arguments.targets[0]).prepare()
    try:
        memory.target(arguments.targets[0]).device()
    except RuntimeError as error:
        print(f"skipped, nothing is recorded: {error}")
        return
    model = "60m" if arguments.quick else arguments.model
    shapes = Shapes.load(model)
    head = ("kernels", "products", "conds", "f32", "bf16", "moved", "args", "temp.")
    print(
        f"{'':38}" + "".join(f"{word:>9}" for word in head) + "  loops: turns x kernels"
    )
    rows = {}
    for case in cases(arguments.targets):
        rows[str(case)] = compile_case(case, shapes, shapes.width // 4)
        print(line(str(case), rows[str(case)]), flush=True)
    result = {"model": model, "rank": shapes.width // 4, "rows": rows}
    name = "_".join(filter(None, ("memory/compiled_step", arguments.label)))
    recording.write(arguments.quick, name, result)


if __name__ == "__main__":
    main()
