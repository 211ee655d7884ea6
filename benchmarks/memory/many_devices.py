# SPDX-License-Identifier: Apache-2.0
"""What each of 16 TPU chips holds and sends in an optimizer step of LLaMA-7B.

    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)

as one program, weights in bf16 and split over all chips along the kept axis (FSDP),
rank 1024, weights and state donated. `steady` has no refresh in it; `any` is the step
that is due to refresh or not, as `tx.update` is without further ado.

    python -m benchmarks.memory.many_devices

Needs the extra aot-tpu and no TPU.
"""

import dataclasses
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from benchmarks.lib import records
from benchmarks.lib.subjects import ADAMW, EIGHT_BIT, GALORE, applied, optimizer, timed
from benchmarks.memory import hlo, tables, targets
from benchmarks.memory.state_per_device import RANK, split
from benchmarks.memory.wire import bytes_sent
from galore_optax import sharded, state_shardings

TOPOLOGY = "v5e:4x4"
STEPS = {"steady": False, "any": None}
COLLECTIVES = "all-gather", "all-reduce", "all-to-all", "collective-permute"


def devices() -> Any:
    target = dataclasses.replace(targets.target("v5e"), topology=TOPOLOGY)
    return target.devices()


def mesh() -> Mesh:
    found = np.array(devices())
    return Mesh(found, ("fsdp",), axis_types=(AxisType.Auto,))


def compiled(name: str, refresh: bool | None) -> tuple[float, Any]:
    """Seconds of compiling, and the program."""
    params = split(mesh(), "hidden", jnp.bfloat16)
    tx = sharded(optimizer(name, RANK, 200), params)
    state = jax.tree.map(
        lambda x, place: x.update(sharding=place),
        jax.eval_shape(tx.init, params),
        state_shardings(tx, params),
    )
    extra = {} if name == ADAMW else {"refresh": refresh}
    step = jax.jit(applied(tx, **extra), donate_argnums=(0, 1))
    lowered = step.trace(params, state, params).lower(lowering_platforms=("tpu",))
    return timed(lowered.compile)


def measure(name: str, refresh: bool | None) -> dict[str, Any]:
    seconds, program = compiled(name, refresh)
    sizes, parsed = program.memory_analysis(), hlo.Program.parse(program.as_text())
    return {
        "arguments": sizes.argument_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "not_donated": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "sent": {kind: bytes_sent(parsed, kind) for kind in COLLECTIVES},
        "compile_seconds": seconds,
    }


def plan() -> list[tuple[str, str]]:
    return [(ADAMW, "any")] + [(x, y) for x in (GALORE, EIGHT_BIT) for y in STEPS]


def main() -> None:
    warnings.simplefilter("ignore")
    targets.target("v5e").prepare()
    try:
        devices()
    except RuntimeError as error:
        sys.exit(f"skipped, nothing is recorded: {error}")
    runs = records.Runs("memory/many_devices")
    rows = [
        {"optimizer": name, "step": step}
        | runs.get(f"{name}, {step}", lambda x=name, y=step: measure(x, STEPS[y]))
        for name, step in plan()
    ]
    found = {"model": "7b", "rank": RANK, "topology": TOPOLOGY, "rows": rows}
    print(tables.many_devices(found))
    records.write("memory/many_devices", found, runs=runs)


if __name__ == "__main__":
    main()
