# SPDX-License-Identifier: Apache-2.0
"""A mesh of eight devices, layouts of a small tree on it, and formats of its state."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_optax as go
from tests.helpers import Tilted, normal_like

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
LR, STEPS, GAP, RANK = 0.01, 10, 4, 4  # of ten steps the first and two more refresh
SHAPES = {
    "embedding": (64, 16),
    "layers": {"up": {"kernel": (4, 16, 32)}, "norm": {"scale": (4, 16)}},
    "w": (48, 16),
}
# Long enough that four devices have whole blocks of eight bits each.
LONG = {
    "embedding": (256, 16),
    "layers": {"up": {"kernel": (4, 16, 344)}, "norm": {"scale": (4, 16)}},
    "w": (256, 16),
}
# std projects the shorter axis: 16 of both kernels.
LAYOUTS = {
    "replicated": (P(), P(), P(), P()),
    "fsdp on the kept axis": (P("fsdp"), P(None, None, "fsdp"), P(), P("fsdp")),
    "fsdp on the projected axis": (
        *(P(None, "fsdp"), P(None, "fsdp"), P(None, "fsdp"), P(None, "fsdp")),
    ),
    "tensor": (P(None, "tp"), P(None, None, "tp"), P(), P("tp")),
    "fsdp and tensor": (
        *(P("tp", "fsdp"), P(None, "fsdp", "tp"), P(None, "fsdp"), P("fsdp", "tp")),
    ),
    "layers": (P("fsdp"), P("fsdp"), P("fsdp"), P("fsdp", "tp")),
}
# With eps the derivative of Adam's direction is at most 1 / eps.
ADAM = optax.adamw(LR, eps=1e-2, weight_decay=0.1)
EIGHT_BIT = go.quantized(ADAM, code=go.codes.companded(min_size=1))


def galore(inner: Any = ADAM, **options: Any) -> Any:
    options = {"subspace": Tilted()} | options
    return go.galore(inner, rank=RANK, update_proj_gap=GAP, **options)


FORMATS: dict[str, Callable[[], Any]] = {
    "f32": galore,
    "8bit": lambda: galore(EIGHT_BIT),
    "int8": lambda: galore(projector_dtype=jnp.int8),
}


def is_shape(x: Any) -> bool:
    return type(x) is tuple


def mesh_of(kind: AxisType, sizes: tuple[int, int] = (4, 2)) -> Any:
    return jax.make_mesh(sizes, ("fsdp", "tp"), axis_types=(kind, kind))


def placed_on(mesh: Any, layout: str, tree: Any = SHAPES) -> Any:
    """A tree of shardings, each spelled as JAX itself would."""
    _, structure = jax.tree.flatten(tree, is_leaf=is_shape)
    specs = [LAYOUTS[layout][i] for i in (0, 2, 1, 3)]  # norm before up
    shapes = jax.tree.leaves(tree, is_leaf=is_shape)
    if AxisType.Explicit in mesh.axis_types:
        pairs = zip(specs, shapes, strict=True)
        specs = [P(*s, *[None] * (len(x) - len(s))) for s, x in pairs]
    return structure.unflatten([NamedSharding(mesh, spec) for spec in specs])


def parameters() -> Any:
    return normal_like(jax.tree.map(jnp.zeros, SHAPES, is_leaf=is_shape), 0)


def abstract(shardings: Any, tree: Any = SHAPES) -> Any:
    return jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place),
        tree,
        shardings,
        is_leaf=is_shape,
    )


def like(tx: Any, params: Any) -> Any:
    """The state of `tx` as shapes, in its places."""
    shapes = jax.eval_shape(tx.init, params)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        go.state_shardings(tx, params),
    )


def collectives(text: str) -> set[str]:
    """Such as `all-gather f32[4,16,4]`."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf" = (\S+|\(.*?\)) ({kinds})(?:-start)?\(", text)
    # Several arrays that are sent at once are a tuple.
    pairs = ((kind, re.findall(r"\w+\[[\d,]*\]", shapes)) for shapes, kind in found)
    return {f"{kind} {shape}" for kind, shapes in pairs for shape in shapes}
