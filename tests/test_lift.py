# SPDX-License-Identifier: Apache-2.0
"""How far the update of a 16-bit leaf is from the exact one, in each of its forms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from tests.helpers import Tilted, normal

RATE, DECAY, SCALE, RANK = 1e-2, 0.1, 0.25, 8
SHAPE = (48, 64)


def by_rows(updates: Any, params: Any) -> Any:
    """Decay that is no single number: twice as much of every second row."""

    def add(update: Any, weight: Any) -> Any:
        twice = 1 + (jnp.arange(len(weight)) % 2)[:, None]
        return update + DECAY * twice.astype(weight.dtype) * weight

    return jax.tree.map(add, updates, params)


def rows_of(weights: np.ndarray) -> np.ndarray:
    return DECAY * (1 + np.arange(len(weights)) % 2)[:, None] * weights


NONE = optax.identity(), np.zeros_like
SCALAR = optax.add_decayed_weights(DECAY), lambda weights: DECAY * weights
BY_ROWS = optax.stateless(by_rows), rows_of


def step(decay: Any, dtype: Any, rate: float) -> tuple[np.ndarray, Any, Any, Any]:
    """The update of one step of gradient descent, and what it is made of, in f64."""
    inner = optax.chain(decay, optax.scale(-rate))
    tx = go.galore(inner, rank=RANK, scale=SCALE, subspace=Tilted())
    weights = {"w": (0.1 * normal(0, SHAPE)).astype(dtype)}
    gradients = {"w": normal(1, SHAPE, dtype)}
    updates, state = jax.jit(tx.update)(gradients, tx.init(weights), weights)
    arrays = updates["w"], state.projector["w"], gradients["w"], weights["w"]
    return tuple(np.asarray(x, np.float64) for x in arrays)  # type: ignore[return-value]


@pytest.mark.parametrize("rate", [RATE, 0.0])
@pytest.mark.parametrize("decay", [NONE, SCALAR, BY_ROWS], ids=["no", "scalar", "rows"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_update_is_exact_to_a_few_roundings(
    dtype: Any, decay: Any, rate: float
) -> None:
    transform, decayed = decay
    update, basis, gradient, weights = step(transform, dtype, rate)
    low = -rate * SCALE * (basis.T @ gradient)
    lifted, decays = basis @ low, -rate * decayed(weights)
    # Roundings to nearest, each of half a unit in the last place: of the low-rank
    # update, an operand of the product; of the product; of the decay, or of its
    # factor; of the sum; and of the sum times the factor. Second orders in what is
    # added; subnormals of f16 are a fixed distance apart; a factor of 0 is 1e-30.
    half = float(jnp.finfo(dtype).eps) / 2
    operand = np.abs(basis) @ np.abs(low)
    total = np.abs(lifted) + np.abs(decays)
    bound = half * (operand + np.abs(lifted) + np.abs(decays) + 2 * total)
    bound = 1.02 * bound + 2 * float(jnp.finfo(dtype).smallest_subnormal)
    bound = bound + 1.02e-30 * np.abs(weights)
    assert np.all(np.abs(update - (lifted + decays)) <= bound)


def test_weights_rest_where_the_rate_is_zero() -> None:
    update, *_, weights = step(SCALAR[0], jnp.bfloat16, 0.0)
    moved = jnp.asarray(weights, jnp.bfloat16) + jnp.asarray(update, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(moved, np.float64), weights)


def test_f32_leaves_are_lifted_in_f32() -> None:
    update, basis, gradient, weights = step(SCALAR[0], jnp.float32, RATE)
    exact = -RATE * (SCALE * basis @ (basis.T @ gradient) + DECAY * weights)
    # Sums of 48 and of 8 products.
    bound = 60 * np.finfo(np.float32).eps * RATE * np.max(np.abs(gradient))
    assert np.max(np.abs(update - exact)) <= bound
