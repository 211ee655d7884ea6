# SPDX-License-Identifier: Apache-2.0
"""Switches of JAX that a user may have set."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.contract.subjects import assert_close, avals, every, params, started
from tests.helpers import normal_like


@contextlib.contextmanager
def custom_prng() -> Iterator[None]:
    before = jax.config.jax_enable_custom_prng
    jax.config.update("jax_enable_custom_prng", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_custom_prng", before)


PROMOTIONS = {
    "rank promotion raises": lambda: jax.numpy_rank_promotion("raise"),
    "strict dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
}
KEYS = {
    "custom keys": custom_prng,
    "rbg": lambda: jax.default_prng_impl("rbg"),
}


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("promotion", PROMOTIONS)
def test_promotes_nothing(make: Any, promotion: str, dtype: Any) -> None:
    """Traced and not run: promotion is refused there."""
    with PROMOTIONS[promotion]():
        tx, weights = make(), jax.eval_shape(lambda: params(dtype))
        state = jax.eval_shape(tx.init, weights)
        _, after = jax.eval_shape(tx.update, weights, state, weights)
    assert avals(after) == avals(state)


@every
def test_a_switch_changes_no_number(make: Any) -> None:
    subject = started(make)
    grads = normal_like(subject.weights, 1)
    plain, _ = subject.update(grads, subject.state, subject.weights)
    with jax.numpy_dtype_promotion("strict"):
        strict, _ = jax.jit(make().update)(grads, subject.state, subject.weights)
    assert_close(strict, plain)


@every
@pytest.mark.parametrize("kind", KEYS)
def test_every_kind_of_key(make: Any, kind: str) -> None:
    with KEYS[kind]():
        tx, weights = make(), params()
        state, update = tx.init(weights), jax.jit(tx.update)
        updates, after = update(normal_like(weights, 1), state, weights)
        assert avals(after) == avals(state)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))
