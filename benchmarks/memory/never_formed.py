# SPDX-License-Identifier: Apache-2.0
"""What gradients that are never formed save: memory, bytes on the wire, FLOPs.

    python -m benchmarks.memory.never_formed bytes [--quick]
    python -m benchmarks.memory.never_formed wire [--quick]
    python -m benchmarks.memory.never_formed flops [--quick]

`bytes`: what one training step of LLaMA-7B holds by buffer assignment for an RTX 4090,
weights in bf16, rank 1024, rematerialised, in one program, beside the same step with
gradients, layer by layer, and with `optax.adamw`; and the products in it that make an
array of the shape of a gradient. Needs the extra aot-cuda, and goes on where it stopped.
`wire`: what eight devices that share a batch all-reduce in a steady step: counted in the
compiled program for a small model, from shapes for larger ones.
`flops`: of all products of a steady step, from its jaxpr, 60M to 7B.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.lib import records
from benchmarks.lib.training_steps import (
    FORMED,
    NEVER,
    abstract,
    loss_of,
    training_step,
)
from benchmarks.memory import hlo, tables
from benchmarks.memory.compiled_step import OPTIONS
from galore_optax import memory
from galore_optax.memory import Method, Setting, Sizes

TARGET = "rtx4090"
ADAMW = Method("adamw")


def rank(value: int, bits: str = "8bit") -> Method:
    return Method(f"galore_adamw{bits}", (("rank", value),))


@dataclasses.dataclass(frozen=True)
class Held:
    """One program whose bytes are read."""

    method: Method
    gradients: str
    setting: Setting
    refresh: bool = True  # whether the program holds one, due or not

    def __str__(self) -> str:
        steady = "" if self.refresh else ", without a refresh"
        return f"{self.method}, {self.gradients}, {self.setting}{steady}"

    def measure(self, sizes: Sizes) -> dict[str, Any]:
        start = time.perf_counter()
        found = self._layerwise(sizes) if self.setting.layerwise else self._step(sizes)
        print(f"compiled {self}: {found['total'] / 1e9:.2f} GB", flush=True)
        return found | {"seconds": round(time.perf_counter() - start, 1)}

    def _layerwise(self, sizes: Sizes) -> dict[str, Any]:
        tx, target = self.method.make(), memory.target(TARGET)
        found = memory.compile_step(sizes, tx, self.setting, target)
        return {"total": found.total, "temporaries": found.temporaries}

    def _step(self, sizes: Sizes) -> dict[str, Any]:
        program = self.compile(sizes)
        found = program.memory_analysis()
        products = gradient_products(hlo.Program.parse(program.as_text()), sizes)
        return {
            "total": found.argument_size_in_bytes
            + found.temp_size_in_bytes
            + found.output_size_in_bytes
            - found.alias_size_in_bytes,
            "temporaries": found.temp_size_in_bytes,
            "gradient_products": len(products),
        }

    def compile(self, sizes: Sizes) -> Any:
        target, tx = memory.target(TARGET), self.method.make()
        sharding = jax.sharding.SingleDeviceSharding(target.device())
        given = abstract(sizes, tx, self.setting)
        placed = jax.tree.map(lambda x: x.update(sharding=sharding), given)
        loss = loss_of(sizes, self.setting.remat)
        step = training_step(loss, tx, self.gradients, None if self.refresh else False)
        traced = jax.jit(step, donate_argnums=(0, 1)).trace(*placed)
        lowered = traced.lower(lowering_platforms=(target.platform,))
        return lowered.compile(compiler_options=OPTIONS)


def held(value: int = 1024) -> list[Held]:
    galore = rank(value)
    short, long = Setting(256, remat=True), Setting(2048, remat=True)
    four = dataclasses.replace(short, accumulation=4)
    by_layer = [dataclasses.replace(x, layerwise=True) for x in (short, long)]
    return [
        *(Held(galore, NEVER, x, refresh=False) for x in (short, long, four)),
        *(Held(galore, NEVER, x) for x in (short, long, four)),
        *(Held(galore, FORMED, x) for x in (short, long, four)),
        *(Held(galore, FORMED, x) for x in by_layer),
        Held(ADAMW, FORMED, short, refresh=False),
    ]


def gradient_products(program: hlo.Program, sizes: Sizes) -> list[hlo.Instruction]:
    """Products of the backward pass that write an array like a projected gradient.

    A compiler merges products that share a factor, those of queries, keys and values,
    of gate and up, and may split a sum: both last axes are a width or some of them.
    """
    sides = {n * side for n in (1, 2, 3) for side in (sizes.width, sizes.hidden)}
    return [
        line
        for line in program
        if line.is_product
        and "transpose(" in line.text
        and any(_is_between(sides, array.shape) for array in line.arrays)
    ]


def _is_between(sides: set[int], shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and sides.issuperset(shape[-2:])


def measure_bytes(quick: bool) -> None:
    memory.target(TARGET).prepare()
    sizes = Sizes.load("9m" if quick else "7b")
    runs = records.Runs(f"memory/never_formed_{TARGET}")
    rows = {}
    for case in held(32)[:1] if quick else held():
        make: Callable[[], Any] = lambda case=case: case.measure(sizes)  # noqa: E731
        rows[str(case)] = make() if quick else runs.get(str(case), make)
    print(rows)
    records.write("memory/never_formed", {"rows": rows}, runs=runs, quick=quick)


def main() -> None:
    parser = records.parser(__doc__, quick=True)
    parser.add_argument("part", choices=("bytes", "wire", "flops"))
    arguments = parser.parse_args()
    parts = {"bytes": measure_bytes}
    parts[arguments.part](arguments.quick)


if __name__ == "__main__":
    main()
