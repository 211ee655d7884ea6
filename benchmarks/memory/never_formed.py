# SPDX-License-Identifier: Apache-2.0
"""What gradients that are never formed save: memory, bytes on the wire, FLOPs.

    python -m benchmarks.memory.never_formed bytes [--quick]
    python -m benchmarks.memory.never_formed wire [--quick]
    python -m benchmarks.memory.never_formed flops [--quick]

`bytes`: what one training step of LLaMA-7B holds by buffer assignment for an RTX 4090,
weights in bf16, rank 1024, rematerialised, in one program, beside the same step with
gradients, layer by layer, and with `optax.adamw`; and the products in it that make an
array like a gradient. Needs the extra aot-cuda, and goes on where it stopped.
`wire`: what eight devices that share a batch all-reduce in a steady step: counted in
the compiled program for a small model, from shapes for larger ones.
`flops`: of all products of a steady step, from its jaxpr, 60M to 7B, at the paper's
ranks and batch of 512 sequences of 256 tokens.
"""

import dataclasses
import time
from typing import Any

import jax

from benchmarks.lib import flops, records
from benchmarks.lib.training_steps import (
    FORMED,
    NEVER,
    Step,
    abstract,
    loss_of,
    training_step,
)
from benchmarks.memory import hlo, tables, wire
from benchmarks.memory.assignment import OPTIONS, lower_step
from benchmarks.memory.targets import target as target_of
from galore_optax.memory import Method, Setting, Sizes

TARGET = "rtx4090"
ADAMW = Method("adamw")
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512, "7b": 1024}  # the paper's
PAPER = Setting(tokens=256, batch=512)


def rank(value: int, bits: str = "8bit") -> Method:
    return Method(f"galore_adamw{bits}", (("rank", value),))


@dataclasses.dataclass(frozen=True)
class Held:
    """One program whose bytes are read."""

    method: Method
    gradients: str
    setting: Setting
    refresh: bool = True  # whether the program holds one, due or not
    shares: int = 1  # in which it is made

    def __str__(self) -> str:
        steady = "" if self.refresh else ", without a refresh"
        shares = f", in {self.shares} shares" if self.shares > 1 else ""
        return f"{self.method}, {self.gradients}, {self.setting}{steady}{shares}"

    def describe(self) -> dict[str, Any]:
        how = "layerwise" if self.setting.layerwise else self.gradients
        shape = {
            name: getattr(self.setting, name) for name in ("tokens", "accumulation")
        }
        return {
            "method": self.method.name,
            "gradients": how,
            "refresh": self.refresh,
            "shares": self.shares,
        } | shape

    def measure(self, sizes: Sizes) -> dict[str, Any]:
        start = time.perf_counter()
        program = self.compile(sizes)
        found = program.memory_analysis()
        total = found.argument_size_in_bytes + found.temp_size_in_bytes
        total += found.output_size_in_bytes - found.alias_size_in_bytes
        print(f"compiled {self}: {total / 1e9:.2f} GB", flush=True)
        made = {"total": total, "temporaries": found.temp_size_in_bytes}
        if not self.setting.layerwise:
            products = gradient_products(hlo.Program.parse(program.as_text()), sizes)
            made["gradient_products"] = len(products)
        return made | {"seconds": round(time.perf_counter() - start, 1)}

    def compile(self, sizes: Sizes) -> Any:
        setting = dataclasses.replace(self.setting, gradients=self.gradients)
        refresh = None if self.refresh else False
        given = self.method.make(), setting, target_of(TARGET), refresh, self.shares
        return lower_step(sizes, *given).compile(compiler_options=OPTIONS["cuda"])


def held(value: int = 1024) -> list[Held]:
    galore = rank(value)
    short, long = Setting(256, remat=True), Setting(2048, remat=True)
    four = dataclasses.replace(short, accumulation=4)
    by_layer = [dataclasses.replace(x, layerwise=True) for x in (short, long)]
    return [
        *(Held(galore, NEVER, x, refresh=False) for x in (short, long, four)),
        *(Held(galore, NEVER, x) for x in (short, long, four)),
        *(Held(galore, NEVER, x, shares=3) for x in (short, long, four)),
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
    target_of(TARGET).prepare()
    sizes = Sizes.load("9m" if quick else "7b")
    runs = records.Runs(f"memory/never_formed_{TARGET}")
    rows = []
    for case in held(32)[:1] if quick else held():
        made = case.measure(sizes) if quick else _on_record(runs, case, sizes)
        rows.append({"case": case.describe(), **made})
    found = {"rows": rows}
    print(tables.never_formed_bytes(found))
    name = "memory/never_formed_bytes"
    records.write(name, found, runs=None if quick else runs, quick=quick)


def _on_record(runs: records.Runs, case: Held, sizes: Sizes) -> dict[str, Any]:
    return runs.get(str(case), lambda: case.measure(sizes))


def measure_wire(quick: bool) -> None:
    jax.config.update("jax_num_cpu_devices", wire.DEVICES)
    names = ("9m",) if quick else ("9m", "350m", "1b", "7b")
    found = {"rows": [_reduced(name, dtype) for dtype in WIDTHS for name in names]}
    print(tables.never_formed_wire(found))
    records.write("memory/never_formed_wire", found, quick=quick)


WIDTHS = "float32", "bfloat16"


def _reduced(name: str, dtype: str) -> dict[str, Any]:
    """Bytes by shape; those of the smallest model in f32 from its program as well."""
    sizes, setting = Sizes.load(name), Setting(32, wire.DEVICES, dtype=dtype)
    value = RANKS.get(name, sizes.width // 4)
    given = sizes, rank(value, "").make(), setting
    row: dict[str, Any] = {"model": name, "rank": value, "dtype": dtype}
    row |= {kind: wire.from_shapes(*given, kind) for kind in (FORMED, NEVER)}
    # On CPU sums of 16 bits are made in 32.
    if name == "9m" and dtype == "float32":
        made = {kind: wire.in_program(*given, kind) for kind in (FORMED, NEVER)}
        row["in_program"] = made
    return row


def measure_flops(quick: bool) -> None:
    names = ("60m",) if quick else tuple(RANKS)
    found = {"rows": [_counted(name, r) for name in names for r in (True, False)]}
    print(tables.never_formed_flops(found))
    records.write("memory/never_formed_flops", found, quick=quick)


def _counted(name: str, remat: bool) -> dict[str, Any]:
    sizes, setting = Sizes.load(name), dataclasses.replace(PAPER, remat=remat)
    galore = rank(RANKS[name], "")
    subjects = {"adamw": (ADAMW, FORMED), FORMED: (galore, FORMED)}
    subjects[NEVER] = galore, NEVER

    def count(method: Method, gradients: str) -> int:
        tx = method.make()
        step: Step = training_step(loss_of(sizes, remat), tx, gradients, False)
        return flops.of_products(step, *abstract(sizes, tx, setting))

    made = {kind: count(*subject) for kind, subject in subjects.items()}
    return {"model": name, "rank": RANKS[name], "remat": remat, **made}


PARTS = {"bytes": measure_bytes, "wire": measure_wire, "flops": measure_flops}


def main() -> None:
    parser = records.parser(__doc__, quick=True)
    parser.add_argument("part", choices=PARTS)
    arguments = parser.parse_args()
    PARTS[arguments.part](arguments.quick)


if __name__ == "__main__":
    main()
