# SPDX-License-Identifier: Apache-2.0
"""`galore_adafactor` late in training, in few bits, and with complex leaves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_optax as go
from tests.helpers import Identity, normal

LR = 1e-2


def at(state: Any, count: int) -> Any:
    """`state` after so many steps."""
    count = jnp.int32(count)
    return state._replace(
        count=count, inner_state=state.inner_state._replace(count=count)
    )


@pytest.mark.parametrize("factor", [100.0, 0.0])
def test_second_moments_move_late_in_training(factor: float) -> None:
    """As with f32 moments, up and down: 16 bits round the decay to one."""
    weights = {"kernel": normal(0, (16, 64)), "bias": jnp.ones(64)}
    grads = {"kernel": normal(1, (16, 64)), "bias": normal(2, (64,))}
    found = []
    for dtype in (jnp.bfloat16, jnp.float32):
        tx = go.galore_adafactor(LR, rank=4, moment_dtype=dtype, subspace=Identity())
        update = jax.jit(tx.update)
        _, state = update(grads, tx.init(weights), weights)
        state = at(state, 100_000)
        for _ in range(50):
            loud = jax.tree.map(lambda g: factor * g, grads)
            _, state = update(loud, state, weights)
        found.append(state.inner_state)
    for field in ("row", "col"):
        few, many = (getattr(inner, field)["kernel"] for inner in found)
        # Rounding a gradient to bf16 moves it by 2^-8 at most, its square by twice.
        np.testing.assert_allclose(few, many, rtol=2.01 * 2**-8)
    biases = [inner.v["bias"] for inner in found]
    np.testing.assert_allclose(*biases, rtol=2.01 * 2**-8)


def test_a_momentum_has_the_dtype_of_moments() -> None:
    weights = {"kernel": normal(0, (16, 64))}
    tx = go.galore_adafactor(LR, rank=4, b1=0.9, moment_dtype=jnp.bfloat16)
    before = tx.init(weights)
    _, after = tx.update(weights, before, weights)
    for state in (before, after):
        assert state.inner_state.m["kernel"].dtype == jnp.bfloat16
        assert state.inner_state.row["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_complex_leaves_keep_their_phase(weight_decay: float) -> None:
    """The first step of Adafactor is the gradient over its modulus, clipped."""
    kernel = normal(0, (16, 64))
    phase = jnp.array([1 + 1j, 1j, -2 + 0j], jnp.complex64)
    value = jnp.array([3 + 4j, 5j, 0j], jnp.complex64)
    weights, grads = {"w": kernel, "phase": value}, {"w": kernel, "phase": phase}
    tx = go.galore_adafactor(
        LR, rank=4, weight_decay=weight_decay, clipping_threshold=None
    )
    updates, state = tx.update(grads, tx.init(weights), weights)
    size = LR * np.sqrt(50 / 3)  # RMS of the parameter
    unit = np.asarray(phase) / np.abs(phase)
    expected = -size * unit - weight_decay * size * np.asarray(value)
    np.testing.assert_allclose(updates["phase"], expected, rtol=1e-5)
    assert state.inner_state.v["phase"].dtype == jnp.float32
