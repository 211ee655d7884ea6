# SPDX-License-Identifier: Apache-2.0
"""Data parallelism by hand, inside `shard_map`: coordinates are sent, and one basis."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import galore_optax as go
from tests.helpers import Tilted, normal
from tests.meshes import ADAM, RANK, collectives, eight

pytestmark = eight
GAP = 3


def mesh() -> Any:
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def transformation() -> Any:
    return go.galore(ADAM, rank=RANK, update_proj_gap=GAP, subspace=Tilted())


def parameters(dtype: Any = jnp.float32) -> Any:
    return {"w": normal(0, (16, 32)).astype(dtype), "bias": jnp.zeros(32, dtype)}


def loss(params: Any, batch: Any) -> jax.Array:
    y = jnp.tanh(batch.astype(params["w"].dtype) @ params["w"] + params["bias"])
    return jnp.mean(y.astype(jnp.float32) ** 2)


def local_gradients(params: Any, batch: Any) -> Any:
    """Of the part of the batch on one device."""
    varying = jax.tree.map(lambda x: jax.lax.pcast(x, "data", to="varying"), params)
    return jax.grad(loss)(varying, batch)


def reducing(step: Any, check: bool = True) -> Any:
    """`step(params, state, batch)` of every device, the batch split over all."""
    specs = P(), P(), P("data")
    return jax.jit(
        jax.shard_map(step, mesh=mesh(), in_specs=specs, out_specs=P(), check_vma=check)
    )


def coordinates_step(refresh: Any = None) -> Any:
    tx = transformation()

    def step(params: Any, state: Any, batch: Any) -> Any:
        low, state = go.project_gradients(
            tx,
            local_gradients(params, batch),
            state,
            params,
            refresh=refresh,
            axis_name="data",
        )
        updates, state = go.update_projected(tx, low, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("check", [True, False])
def test_averaged_coordinates_train_as_averaged_gradients_do(check: bool) -> None:
    """Ten steps, four of them with a refresh."""
    tx = transformation()

    def dense(params: Any, state: Any, batch: Any) -> Any:
        gradients = jax.lax.pmean(local_gradients(params, batch), "data")
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    ends = []
    for step in (coordinates_step(), dense):
        train, params = reducing(step, check), parameters()
        state = tx.init(params)
        for number in range(10):
            params, state = train(params, state, normal(number, (64, 16)))
        ends.append((params, state.projector))
    # A mean of eight products is the product of the mean but for roundings, 16 terms
    # each, of entries below one, which 1/eps, ten steps of 0.01 and the scale of 0.25
    # make 16 * 8 * 2^-24 / 1e-2 * 0.01 * 10 * 0.25 < 2e-5.
    for one, two in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=2e-5)


def test_a_local_gradient_is_refused_where_bases_would_differ() -> None:
    tx, params = transformation(), parameters()
    state, batch = tx.init(params), normal(1, (64, 16))

    def projected(params: Any, state: Any, batch: Any, refresh: Any = None) -> Any:
        gradients = local_gradients(params, batch)
        low, state = go.project_gradients(tx, gradients, state, params, refresh=refresh)
        return jax.lax.pmean(low, "data"), state

    def whole(params: Any, state: Any, batch: Any) -> Any:
        return tx.update(local_gradients(params, batch), state, params)

    message = r"gradient of 'w' differs over the mesh axes 'data'.*axis_name='data'"
    for step in (projected, whole):
        with pytest.raises(ValueError, match=message):
            reducing(step)(params, state, batch)
    # Without a refresh local coordinates are of one basis.
    steady = reducing(lambda *trees: projected(*trees, refresh=False))
    low, _ = steady(params, state, batch)
    assert low["w"].shape == (RANK, 32)


@pytest.mark.optimized
def test_a_steady_step_sends_coordinates() -> None:
    params = parameters()
    state, batch = transformation().init(params), normal(1, (64, 16))
    steady = reducing(coordinates_step(refresh=False)).lower(params, state, batch)
    moved = collectives(steady.compile().as_text())
    assert moved == {f"all-reduce f32[{RANK},32]", "all-reduce f32[32]"}


def test_coordinates_are_sent_in_the_dtype_of_the_gradients() -> None:
    params = parameters(jnp.bfloat16)
    state, batch = transformation().init(params), normal(1, (64, 16))
    text = str(
        reducing(coordinates_step(refresh=False)).trace(params, state, batch).jaxpr
    )
    sums = [line for line in text.splitlines() if " psum" in line]
    assert len(sums) >= 2
    assert all("bf16[" in line and "f32[" not in line for line in sums)
