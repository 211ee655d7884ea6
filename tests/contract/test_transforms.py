# SPDX-License-Identifier: Apache-2.0
"""Inside JAX's own transformations: shard_map, vmap, grad."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import galore_optax as go
from tests.contract.subjects import assert_close, outermost, started
from tests.contract.subjects import every as every_row
from tests.helpers import normal_like


def replicas(tree: Any) -> Any:
    """Two that differ, stacked along a new first axis."""
    return jax.tree.map(lambda x, y: jnp.stack([x, x + y]), tree, normal_like(tree, 7))


def of_replica(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda x: x[index], tree)


@every_row
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_a_replica_a_device_in_shard_map(make: Any) -> None:
    """Local SGD, or a seed a device: params, gradients and state vary over the mesh."""
    subject = started(make)
    both = replicas(subject.weights)
    states = jax.tree.map(lambda x: jnp.stack([x, x]), subject.state)

    def step(weights: Any, state: Any, grads: Any) -> Any:
        mine = of_replica((weights, state, grads), 0)
        updates, state = subject.tx.update(mine[2], mine[1], mine[0])
        return jax.tree.map(lambda x: x[None], (updates, state))

    mesh = jax.make_mesh(
        (2,), ("replica",), (AxisType.Auto,), devices=jax.devices()[:2]
    )
    on_devices = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=P("replica"), out_specs=P("replica"))
    )
    alone = [(of_replica(both, i), subject.state) for i in range(2)]
    for number in range(2):
        grads = replicas(normal_like(subject.weights, number))
        found, states = on_devices(both, states, grads)
        for i, (weights, state) in enumerate(alone):
            updates, state = subject.update(of_replica(grads, i), state, weights)
            alone[i] = weights, state
            # The same program but for its fusions: some roundings of sums of 24.
            assert_close(of_replica(found, i), updates, rtol=1e-4, atol=1e-6)


def loss(weights: Any) -> Any:
    return sum(jnp.sum(jnp.sin(x) ** 2) for x in jax.tree.leaves(weights))


@outermost
def test_gradient_through_a_refresh(make: Any) -> None:
    """Bases are constants: the gradient is that of an update with the basis given."""
    subject = started(make)
    weights, tx = subject.weights, subject.tx
    # Moments of another gradient, lest the update be its sign, whose derivative is 0.
    _, state = subject.update(normal_like(weights, 3), subject.state, weights)

    def refreshed(grads: Any) -> Any:
        return go.project_gradients(tx, grads, state, weights, refresh=True)

    def after(weights: Any, state: Any, refresh: bool) -> Any:
        grads = jax.grad(loss)(weights)
        updates, _ = tx.update(grads, state, weights, refresh=refresh)
        return loss(optax.apply_updates(weights, updates))

    _, given = jax.jit(refreshed)(jax.grad(loss)(weights))
    derivative = jax.jit(jax.grad(after), static_argnums=2)
    found, expected = (
        derivative(weights, state, True),
        derivative(weights, given, False),
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))
    # Both multiply by the same basis, found by one program and by another.
    assert_close(found, expected, rtol=1e-3, atol=1e-4)
