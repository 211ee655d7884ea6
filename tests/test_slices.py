# SPDX-License-Identifier: Apache-2.0
"""Products with a stack's projectors, a layer at a time: the same bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_optax as go
from galore_optax._projector import slices
from tests.helpers import normal_like
from tests.meshes import ADAM, AUTO, EXPLICIT, RANK, collectives, eight, like, mesh_of

pytestmark = eight

# The second has its batch axis between those of its matrices.
SHAPES = {"up": (4, 256, 264), "down": (264, 4, 256), "one": (16, 48)}
NUMBERS = {
    "up": optax.contrib.MuonDimensionNumbers(1, 2),
    "down": optax.contrib.MuonDimensionNumbers(0, 2),
    "one": optax.contrib.MuonDimensionNumbers(0, 1),
}
KEPT = {"up": P(None, None, "fsdp"), "down": P("fsdp"), "one": P(None, "fsdp")}
BOTH = {
    "up": P(None, "tp", "fsdp"),
    "down": P("fsdp", None, "tp"),
    "one": P("tp", "fsdp"),
}
LAYERS = {"up": P("fsdp"), "down": P(None, "fsdp"), "one": P("tp", "fsdp")}


def spelled(spec: P, kind: AxisType, axes: int) -> P:
    return P(*spec, *[None] * (axes - len(spec))) if kind is EXPLICIT else spec


def abstract(specs: Any, kind: AxisType) -> Any:
    mesh = mesh_of(kind)
    return {
        name: jax.ShapeDtypeStruct(
            shape,
            jnp.float32,
            sharding=NamedSharding(mesh, spelled(specs[name], kind, len(shape))),
        )
        for name, shape in SHAPES.items()
    }


def steady(tx: Any, params: Any) -> Any:
    def step(grads: Any, state: Any, params: Any) -> Any:
        return tx.update(grads, state, params, refresh=False)

    with jax.set_mesh(jax.tree.leaves(params)[0].sharding.mesh):
        return jax.jit(step).lower(params, like(tx, params), params).compile()


def filled(tree: Any, seed: int) -> Any:
    """Random arrays, a layer unlike the next, where those of `tree` are to lie."""

    def one(x: Any, y: jax.Array) -> jax.Array:
        y = 40 * y if jnp.issubdtype(x.dtype, jnp.integer) and x.ndim else abs(y)
        return jax.device_put(y.astype(x.dtype), x.sharding)

    shapes = jax.tree.map(lambda x: jnp.zeros(x.shape), tree)
    return jax.tree.map(one, tree, normal_like(shapes, seed))


@pytest.mark.parametrize(
    ("specs", "kind", "options"),
    [
        (KEPT, AUTO, {"projector_dtype": jnp.int8}),
        (BOTH, EXPLICIT, {}),
        pytest.param(BOTH, AUTO, {"proj_type": "full"}, marks=pytest.mark.slow),
        pytest.param(LAYERS, EXPLICIT, {}, marks=pytest.mark.slow),
    ],
)
def test_a_layer_at_a_time_gives_the_bits_of_all_at_once(
    specs: Any, kind: AxisType, options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = abstract(specs, kind)
    tx = go.galore(ADAM, rank=RANK, weight_dimension_numbers=NUMBERS, **options)
    tx = go.sharded(tx, params)
    given = filled((params, like(tx, params), params), 0)
    found = []
    for size in (slices.GATHERED_BYTES, 1):
        monkeypatch.setattr(slices, "GATHERED_BYTES", size)
        found.append(steady(tx, params)(*given))
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        assert one.sharding == two.sharding
        np.testing.assert_array_equal(one, two)


@pytest.mark.optimized
def test_no_more_is_gathered_than_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "GATHERED_BYTES", 2 * 256 * RANK * 4)  # two layers
    params = abstract(KEPT, AUTO)
    tx = go.galore(ADAM, rank=RANK, weight_dimension_numbers=NUMBERS)
    text = steady(go.sharded(tx, params), params).as_text()
    assert collectives(text) == {
        f"all-gather f32[2,256,{RANK}]",
        f"all-gather f32[16,{RANK}]",
    }
