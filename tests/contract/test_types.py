# SPDX-License-Identifier: Apache-2.0
"""Shapes and dtypes of updates and state, and how often they are compiled."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from galore_optax.memory import _methods
from tests.contract.subjects import (
    READY_MADE,
    assert_equal,
    avals,
    every,
    params,
    ready_made,
    started,
)
from tests.helpers import normal_like

FLOATS = [jnp.float16, jnp.bfloat16, jnp.float32]
NARROW = [(params, grads, False) for params in FLOATS for grads in FLOATS]
WIDE = [
    (jnp.float64, jnp.float64, True),
    (jnp.float64, jnp.bfloat16, True),
    (jnp.float32, jnp.float64, True),
]


def test_every_ready_made_optimizer_is_a_row() -> None:
    assert set(READY_MADE) == set(_methods._READY)


def compilations(caplog: Any) -> list[str]:
    messages = (record.getMessage() for record in caplog.records)
    return [message for message in messages if message.startswith("Compiling")]


@pytest.mark.one_device
@every
def test_compiles_once(make: Any, caplog: Any) -> None:
    tx, weights = make(), params()
    state, grads = tx.init(weights), normal_like(weights, 1)

    @jax.jit
    def the_step(grads: Any, state: Any, weights: Any) -> Any:
        return tx.update(grads, state, weights)

    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            _, state = the_step(grads, state, weights)
    assert sum("the_step" in message for message in compilations(caplog)) == 1


@every
def test_without_jit_only_the_first_update_compiles(make: Any, caplog: Any) -> None:
    tx, weights = make(), params()
    grads = normal_like(weights, 1)
    _, state = tx.update(grads, tx.init(weights), weights)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            _, state = tx.update(grads, state, weights)
    assert compilations(caplog) == []


@pytest.mark.one_device
@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_updates_and_state_keep_their_types(make: Any, dtype: Any) -> None:
    subject = started(make, dtype)
    weights, state = subject.weights, subject.state
    updates, after = subject.update(normal_like(weights, 1), state, weights)
    assert avals(state) == avals(after)
    assert avals(jax.eval_shape(subject.tx.init, weights)) == avals(state)
    same = jax.tree.map(lambda u, p: u.dtype == p.dtype, updates, weights)
    assert all(jax.tree.leaves(same))


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stable_under_cond(make: Any, dtype: Any) -> None:
    subject = started(make, dtype)
    weights, state = subject.weights, subject.state
    grads = normal_like(weights, 1)

    def maybe(flag: Any) -> Any:
        skip = lambda: (grads, state)  # noqa: E731
        return jax.lax.cond(
            flag, lambda: subject.tx.update(grads, state, weights), skip
        )

    _, after = jax.eval_shape(maybe, True)
    assert avals(after) == avals(state)


@every
@pytest.mark.parametrize(("dtype", "gradient_dtype", "x64"), NARROW + WIDE)
def test_types_of_state_and_updates_are_those_of_params(
    make: Any, dtype: Any, gradient_dtype: Any, x64: bool
) -> None:
    """Traced and not run: types are decided there."""
    with jax.enable_x64(x64):
        tx, weights = make(), jax.eval_shape(lambda: params(dtype))
        grads = jax.tree.map(lambda x: x.update(dtype=gradient_dtype), weights)
        state = jax.eval_shape(tx.init, weights)
        updates, after = jax.eval_shape(tx.update, grads, state, weights)
        assert avals(after) == avals(state)
        assert avals(updates) == avals(weights)


@every
def test_float64_keeps_its_precision(make: Any) -> None:
    with jax.enable_x64(True):
        tx, weights = make(), params(jnp.float64)
        state = tx.init(weights)
        updates, after = jax.jit(tx.update)(normal_like(weights, 1), state, weights)
        assert avals(after) == avals(state)
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(updates))


SHAPES = {
    "a scalar": {"a": ()},
    "a vector": {"a": (5,)},
    "a list": {"a": [(3,), (7, 12)]},
    "four axes": {"experts": {"up": {"kernel": (2, 3, 8, 12)}}},
    "an empty branch": {"a": {}, "b": [], "c": None},
}


@ready_made
@pytest.mark.parametrize("beside", SHAPES)
def test_updates_have_the_shapes_of_params(make: Any, beside: str) -> None:
    shapes = {"w": (16, 8), **SHAPES[beside]}
    weights = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        shapes,
        is_leaf=lambda x: type(x) is tuple,
    )
    tx = make()
    state = jax.eval_shape(tx.init, weights)
    updates, after = jax.eval_shape(tx.update, weights, state, weights)
    assert jax.tree.structure(updates) == jax.tree.structure(weights)
    assert avals(updates) == avals(weights)
    assert avals(after) == avals(state)


@every
def test_initialises_from_shapes(make: Any) -> None:
    subject = started(make)
    shapes = jax.eval_shape(lambda: subject.weights)
    assert_equal(subject.tx.init(shapes), subject.state)


@every
def test_same_seed_same_numbers(make: Any) -> None:
    subject = started(make)
    grads = normal_like(subject.weights, 1)
    again = make()
    assert_equal(
        subject.update(grads, subject.state, subject.weights),
        jax.jit(again.update)(grads, again.init(subject.weights), subject.weights),
    )
