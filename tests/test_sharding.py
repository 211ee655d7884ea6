# SPDX-License-Identifier: Apache-2.0
"""The same numbers on a mesh of eight devices, under Auto and Explicit axes."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_optax as go
from tests.helpers import normal_like

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

SPECS = {
    "w": P("x", "y"),
    "square": P("y", None),
    "heads": {"query": {"kernel": P("x", "y", None)}},
    "layers": {"up": {"kernel": P(None, "x", "y")}, "norm": {"scale": P(None, "x")}},
    "experts": {"up": {"kernel": P("x", None, "y")}},
    "embedding": P("y", "x"),
}
SHAPES = {
    "w": (32, 16),
    "square": (16, 16),
    "heads": {"query": {"kernel": (16, 4, 8)}},
    "layers": {"up": {"kernel": (3, 16, 32)}, "norm": {"scale": (3, 16)}},
    "experts": {"up": {"kernel": (4, 16, 32)}},
    "embedding": (64, 16),
}
SLOW_FULL = pytest.param("full", marks=pytest.mark.slow)
METHODS = [
    pytest.param(go.subspace.power(), id="power"),
    pytest.param(go.subspace.svd(), id="svd", marks=pytest.mark.slow),
    pytest.param(go.subspace.eigh(), id="eigh", marks=pytest.mark.slow),
]


def is_spec(x: Any) -> bool:
    return isinstance(x, P)


def parameters() -> Any:
    zeros = jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda x: type(x) is tuple)
    return normal_like(zeros, 0)


def mesh_of(kind: AxisType) -> Any:
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


def put(tree: Any, mesh: Any) -> Any:
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), SPECS, is_leaf=is_spec)
    return jax.device_put(tree, shardings)


@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("proj_type", ["std", SLOW_FULL])
@pytest.mark.parametrize("method", METHODS)
def test_sharded_equals_unsharded(method: Any, proj_type: str, kind: AxisType) -> None:
    tx = go.galore(
        # With exact bases on both sides R is diagonal but for rounding, which Adam with
        # its usual eps would blow up to the size of the diagonal.
        optax.adamw(0.1, eps=1e-2, weight_decay=0.1),
        rank=4,
        update_proj_gap=2,
        subspace=method,
        proj_type=proj_type,
    )
    plain = parameters()
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        sharded = put(plain, mesh)
        state = tx.init(sharded)
        update = jax.jit(tx.update)
        ours = []
        for step in range(3):
            grads = put(normal_like(plain, step + 1), mesh)
            updates, state = update(grads, state, sharded)
            ours.append(jax.device_get(updates))
    expected = tx.init(plain)
    update = jax.jit(tx.update)
    for step in range(3):
        grads = normal_like(plain, step + 1)
        updates, expected = update(grads, expected, plain)
        # Sums in another order: ulps, which a gap of the spectrum near 1e-2 turns into
        # 1e-5 in the basis and Adam's eps, for small entries, into 1e-3 at most.
        for a, b in zip(
            jax.tree.leaves(ours[step]), jax.tree.leaves(updates), strict=True
        ):
            assert np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(b)


def typeof(tree: Any) -> Any:
    return jax.tree.map(jax.typeof, tree)


def test_explicit_state_keeps_its_type() -> None:
    mesh = mesh_of(AxisType.Explicit)
    tx = go.galore_adamw(0.1, rank=4)
    with jax.set_mesh(mesh):
        params = put(parameters(), mesh)
        eager, jitted = tx.init(params), jax.jit(tx.init)(params)
        assert typeof(eager) == typeof(jitted)
        _, after = jax.jit(tx.update)(params, eager, params)
        assert typeof(after) == typeof(eager)
        _, after = tx.update(params, eager, params)
        assert typeof(after) == typeof(eager)


def spec(x: jax.Array) -> tuple[Any, ...]:
    return tuple(x.sharding.spec) + (None,) * (x.ndim - len(x.sharding.spec))


def started(kind: AxisType) -> Any:
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        return go.galore(optax.adam(0.1), rank=4).init(put(parameters(), mesh))


def test_kept_axes_keep_their_mesh_axes() -> None:
    state = started(AxisType.Auto)
    mu = state.inner_state[0].mu
    assert spec(mu["w"]) == ("x", None)  # tall: the columns are projected
    assert spec(mu["heads"]["query"]["kernel"]) == (None, "y", None)
    assert spec(mu["layers"]["up"]["kernel"]) == (None, None, "y")
    assert spec(mu["experts"]["up"]["kernel"]) == ("x", None, "y")
    assert spec(mu["embedding"]) == ("y", "x")
    for projector in jax.tree.leaves(state.projector):
        assert projector.sharding.is_fully_replicated


def test_where_types_tell_no_mesh_axis_is_left_unused() -> None:
    state = started(AxisType.Explicit)
    mu, projector = state.inner_state[0].mu, state.projector
    assert spec(mu["w"]) == (("x", "y"), None)
    assert spec(mu["heads"]["query"]["kernel"]) == (None, "y", "x")
    assert spec(mu["layers"]["up"]["kernel"]) == (None, None, ("y", "x"))
    assert spec(mu["experts"]["up"]["kernel"]) == ("x", None, "y")
    assert spec(mu["embedding"]) == ("y", "x")
    assert spec(projector["w"]) == (("y", "x"), None)
    assert spec(projector["heads"]["query"]["kernel"]) == (("x", "y"), None)
    assert spec(projector["layers"]["up"]["kernel"]) == (None, ("x", "y"), None)
    assert spec(projector["experts"]["up"]["kernel"]) == ("x", "y", None)
