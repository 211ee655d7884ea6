# SPDX-License-Identifier: Apache-2.0
"""What Optax puts around a transformation, and what drives it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from tests.contract.subjects import (
    LR,
    assert_close,
    assert_equal,
    every,
    params,
    started,
)
from tests.helpers import normal_like


@every
def test_ignores_unknown_extra_arguments(make: Any) -> None:
    subject = started(make)
    assert isinstance(subject.tx, optax.GradientTransformationExtraArgs)
    arguments = normal_like(subject.weights, 1), subject.state, subject.weights
    plain = subject.update(*arguments)
    assert_equal(plain, subject.update(*arguments, unknown=jnp.ones(3)))


@every
def test_multi_steps(make: Any) -> None:
    for wrapper in (optax.MultiSteps, go.MultiSteps):
        tx, weights = wrapper(make(), 2), params()
        state, update = tx.init(weights), jax.jit(tx.update)
        for step in range(4):
            updates, state = update(normal_like(weights, step), state, weights)
            moved = any(np.any(x != 0) for x in jax.tree.leaves(updates))
            assert moved == (step % 2 == 1)


@every
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip(1.0), tx, optax.scale(0.5)),
        lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("galore", tx)),
        lambda tx: optax.masked(tx, {"embedding": False, "layers": True, "w": True}),
        lambda tx: optax.partition(
            {"low": tx, "full": optax.adam(LR)},
            {"embedding": "full", "layers": "low", "w": "low"},
        ),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.contrib.schedule_free(tx, LR),
    ],
    ids=["chain", "named_chain", "masked", "partition", "apply_if_finite", "free"],
)
def test_inside_wrappers(make: Any, wrap: Any) -> None:
    tx, weights = wrap(make()), params()
    state, update = tx.init(weights), jax.jit(tx.update)
    for step in range(3):
        updates, state = update(normal_like(weights, step), state, weights)
        weights = optax.apply_updates(weights, updates)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(weights))


@pytest.mark.one_device
@every
def test_scan_equals_a_loop(make: Any) -> None:
    subject = started(make)
    weights, state = subject.weights, subject.state
    several = jax.tree.map(
        lambda x: jnp.stack([x, 2 * x, -x, x]), normal_like(weights, 1)
    )

    def step(state: Any, grads: Any) -> Any:
        updates, state = subject.tx.update(grads, state, weights)
        return state, updates

    last, stacked = jax.jit(lambda s: jax.lax.scan(step, s, several))(state)
    for i in range(4):
        grads = jax.tree.map(lambda x, i=i: x[i], several)
        updates, state = subject.update(grads, state, weights)
        found = jax.tree.map(lambda x, i=i: x[i], stacked)
        assert_close(found, updates, rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(last) == jax.tree.structure(state)
