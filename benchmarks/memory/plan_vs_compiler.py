# SPDX-License-Identifier: Apache-2.0
"""How far the planner's estimates lie from what a compiler assigns.

python -m benchmarks.memory.plan_vs_compiler [TARGET [MODEL]]

Needs the extra aot-cuda, or aot-tpu for a TPU, and no device. With a model only its
rows. Each row is one full training step: weights in bf16 unless a dtype is named, loss,
gradients and update in one program.
"""

import dataclasses
import sys
import time
from typing import Any

from benchmarks.lib import records
from benchmarks.memory import tables
from benchmarks.memory.assignment import compile_step
from benchmarks.memory.targets import target as target_of
from galore_optax import memory
from galore_optax.memory import Method, Setting, Sizes

GALORE = "galore_adamw"
TINY = Setting(remat=True)
LONG = Setting(tokens=1024, remat=True)


def rank(name: str, value: int) -> Method:
    return Method(name, (("rank", value),))


def layerwise(tokens: int, **counts: int) -> Setting:
    return Setting(tokens, remat=True, layerwise=True, **counts)


def never(tokens: int, **how: Any) -> Setting:
    return Setting(tokens, **({"remat": True} | how), gradients="never")


def _case(model: str, method: Method | str, setting: Setting = TINY) -> Any:
    return model, Method(method) if isinstance(method, str) else method, setting


CASES = [
    # The optimizers at three sizes.
    *(
        _case("130m", m)
        for m in ("adamw", rank(GALORE, 256), rank(GALORE + "8bit", 256))
    ),
    *(_case("1b", m) for m in ("adamw", rank(GALORE, 512), rank(GALORE + "8bit", 512))),
    *(
        _case("7b", m)
        for m in ("adamw", rank(GALORE, 1024), rank(GALORE + "8bit", 1024))
    ),
    # Other optimizers.
    *(_case("1b", m) for m in ("adamw8bit", "lion", "adafactor", "sgd")),
    _case("1b", rank("galore_adafactor", 512)),
    _case("1b", rank("galore_lion", 512)),
    # Activations, without and with remat.
    *(_case("130m", "adamw", Setting(256, 16, remat=r)) for r in (False, True)),
    *(_case("1b", "adamw", Setting(1024, 1, remat=r)) for r in (False, True)),
    *(_case("1b", "adamw", Setting(512, 4, remat=r)) for r in (False, True)),
    *(_case("1b", "adamw", Setting(2048, 2, remat=r)) for r in (False, True)),
    *(_case("7b", "adamw", Setting(1024, 1, remat=r)) for r in (False, True)),
    _case("7b", rank(GALORE + "8bit", 1024), Setting(2048, remat=True)),
    # Layerwise.
    *(_case("7b", rank(GALORE + "8bit", 1024), layerwise(t)) for t in (256, 2048)),
    _case("1b", rank(GALORE, 512), layerwise(256)),
    _case("1b", "adamw", layerwise(1024)),
    _case("1b", rank(GALORE + "8bit", 512), layerwise(512, batch=2, accumulation=2)),
    _case("7b", rank(GALORE + "8bit", 1024), layerwise(256, accumulation=4)),
    _case("130m", rank(GALORE, 256), layerwise(256, batch=8)),
    # Gradients never formed.
    *(_case("7b", rank(GALORE + "8bit", 1024), never(t)) for t in (256, 2048)),
    _case("7b", rank(GALORE + "8bit", 1024), never(256, accumulation=4)),
    _case("1b", rank(GALORE, 512), never(256)),
    _case("1b", rank(GALORE + "8bit", 512), never(512, batch=4)),
    _case("1b", rank(GALORE + "8bit", 512), never(256, accumulation=4)),
    _case("1b", rank(GALORE + "8bit", 512), never(1024, remat=False)),
    _case("1b", rank(GALORE + "8bit", 512), never(256, dtype="float32")),
    _case("130m", rank(GALORE, 256), never(256, batch=8)),
    # Accumulation and f32.
    _case("1b", "adamw", dataclasses.replace(LONG, accumulation=4)),
    _case("1b", rank(GALORE, 512), dataclasses.replace(TINY, accumulation=4)),
    _case("1b", "adamw", dataclasses.replace(LONG, dtype="float32")),
    _case("1b", rank(GALORE, 512), dataclasses.replace(TINY, dtype="float32")),
]


def compare(
    model: str, method: Method, setting: Setting, target: Any
) -> dict[str, Any]:
    sizes = Sizes.load(model)
    ours = memory.plan(sizes, method, setting)
    start = time.perf_counter()
    found = compile_step(sizes, method.make(), setting, target)
    seconds = time.perf_counter() - start
    ours_total = ours.total + found.tokens
    return {
        "model": model,
        "method": str(method),
        "setting": str(setting),
        "phase": ours.peak.name,
        "estimate": ours.terms | {"tokens": found.tokens, "total": ours_total},
        "compiler": dataclasses.asdict(found) | {"total": found.total},
        "arguments_difference": ours.weights + ours.state.total + found.tokens
        - found.arguments,
        "temporaries_relative": ours.peak.total / found.temporaries - 1,
        "total_relative": ours_total / found.total - 1,
        "seconds": round(seconds, 1),
    }  # fmt: skip


def main() -> None:
    target = target_of(sys.argv[1] if len(sys.argv) > 1 else "rtx4090")
    target.prepare()
    rows, only = [], sys.argv[2:3]
    for case in (case for case in CASES if not only or case[0] in only):
        rows.append(compare(*case, target))
        print(*(rows[-1][x] for x in ("model", "method", "setting")), flush=True)
    found = {"target": target.name, "rows": rows}
    print(tables.plan_vs_compiler(found))
    suffix = "" if target.name == "rtx4090" else f"_{target.name}"
    records.write(f"memory/plan_vs_compiler{suffix}", found)


if __name__ == "__main__":
    main()
