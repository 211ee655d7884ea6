# SPDX-License-Identifier: Apache-2.0
"""Switches of JAX that a user may have set."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax as go
from tests.contract.subjects import LR, READY_MADE, avals, every, params
from tests.helpers import normal_like


@contextlib.contextmanager
def custom_prng() -> Iterator[None]:
    before = jax.config.jax_enable_custom_prng
    jax.config.update("jax_enable_custom_prng", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_custom_prng", before)


KEYS = {
    "custom keys": custom_prng,
    "rbg": lambda: jax.default_prng_impl("rbg"),
}


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_broadcasts_no_ranks(make: Any, dtype: Any) -> None:
    """Traced and not run: promotion is refused there."""
    with jax.numpy_rank_promotion("raise"):
        assert_keeps_types(make(), dtype)


# Optax's Adam raises a Python float to an int32, which strict promotion refuses.
STRICT = {
    "galore(sgd)": lambda: go.galore(optax.sgd(LR, momentum=0.9), rank=4),
    "galore(lion)": lambda: go.galore(optax.lion(LR, weight_decay=0.01), rank=4),
    "galore(rmsprop), int4": lambda: go.galore(
        optax.rmsprop(LR), rank=4, projector_dtype="int4"
    ),
    "quantized(rmsprop)": lambda: go.galore(
        go.quantized(optax.rmsprop(LR), code=go.codes.companded(min_size=64)), rank=4
    ),
    "galore_adafactor": READY_MADE["galore_adafactor"],
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", STRICT)
def test_promotes_no_dtypes(name: str, dtype: Any) -> None:
    with jax.numpy_dtype_promotion("strict"):
        assert_keeps_types(STRICT[name](), dtype)


def assert_keeps_types(tx: Any, dtype: Any) -> None:
    weights = jax.eval_shape(lambda: params(dtype))
    state = jax.eval_shape(tx.init, weights)
    _, after = jax.eval_shape(tx.update, weights, state, weights)
    assert avals(after) == avals(state)


@every
@pytest.mark.parametrize("kind", KEYS)
def test_every_kind_of_key(make: Any, kind: str) -> None:
    with KEYS[kind]():
        tx, weights = make(), params()
        state, update = tx.init(weights), jax.jit(tx.update)
        updates, after = update(normal_like(weights, 1), state, weights)
        assert avals(after) == avals(state)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))
