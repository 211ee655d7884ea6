# SPDX-License-Identifier: Apache-2.0
"""Bytes of optimizer state on each device, LLaMA-7B in bf16, over numbers of devices.

From shapes alone: any number of devices may be asked about on any machine.

python -m benchmarks.memory.state_per_device
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from benchmarks.lib import records
from benchmarks.memory import tables
from galore_optax import galore_adamw, galore_adamw8bit, memory
from galore_optax._asking.record import heard
from galore_optax._placing.state import per_device

DEVICES = (1, 2, 4, 8, 16, 32, 64)
RANK = 1024
Make = Callable[[], optax.GradientTransformation]
OPTIMIZERS: dict[str, tuple[Make, Any]] = {  # and the dtype of its weights
    "adamw, bf16 moments": (lambda: optax.adamw(1e-3), jnp.bfloat16),
    "adamw, f32 moments": (lambda: optax.adamw(1e-3), jnp.float32),
    "galore_adamw": (lambda: galore_adamw(1e-3, rank=RANK), jnp.bfloat16),
    "galore_adamw, int8 projectors": (
        lambda: galore_adamw(1e-3, rank=RANK, projector_dtype=jnp.int8),
        jnp.bfloat16,
    ),
    "galore_adamw8bit": (lambda: galore_adamw8bit(1e-3, rank=RANK), jnp.bfloat16),
}
# Which axis of every kernel is split. GaLore projects the shorter: the width.
LAYOUTS = {"hidden": "the longer axis, which is kept", "width": "the projected axis"}


def mesh_of(devices: int) -> AbstractMesh:
    return AbstractMesh((devices,), ("fsdp",), axis_types=(AxisType.Auto,))


def split(mesh: Any, layout: str, dtype: Any) -> Any:
    """LLaMA-7B's shapes, each leaf split over the axis `fsdp` of a mesh."""

    def one(x: Any) -> Any:
        kept = max(range(len(x.shape)), key=lambda axis: (x.shape[axis], axis))
        axes = range(max(0, len(x.shape) - 2), len(x.shape))
        other = min(axes, key=lambda axis: (x.shape[axis], axis))
        norm = len(x.shape) == 1 or x.shape[-2] == memory.Sizes.load("7b").layers
        spec: list[str | None] = [None] * len(x.shape)
        spec[kept if layout == "hidden" or norm else other] = "fsdp"
        return x.update(sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(one, memory.shapes(memory.Sizes.load("7b"), dtype))


def row(name: str, layout: str) -> dict[str, Any]:
    make, dtype = OPTIMIZERS[name]
    found = {}
    for devices in DEVICES:
        tx, params = make(), split(mesh_of(devices), layout, dtype)
        _, state = heard(tx, jax.tree.map(lambda x: x.update(sharding=None), params))
        held = per_device(tx, params, state)
        assert held is not None
        found[str(devices)] = {"bytes": held.bytes, "everywhere": held.everywhere}
    return {"optimizer": name, "split": layout, "devices": found}


def main() -> None:
    warnings.simplefilter("ignore")
    rows = [row(name, layout) for layout in LAYOUTS for name in OPTIMIZERS]
    found = {"model": "7b", "rank": RANK, "rows": rows}
    print(tables.state_per_device(found))
    records.write("memory/state_per_device", found)


if __name__ == "__main__":
    main()
