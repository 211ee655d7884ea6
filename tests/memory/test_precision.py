# SPDX-License-Identifier: Apache-2.0
"""An optimizer computed in f32 for 16-bit weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax.memory import Method
from tests.helpers import normal

WIDE = Method("adamw", (("moment_dtype", "float32"), ("weight_decay", 0.1)))


def test_updates_are_those_of_f32_rounded() -> None:
    params = {"w": normal(0, (8, 12)).astype(jnp.bfloat16)}
    grads = {"w": normal(1, (8, 12)).astype(jnp.bfloat16)}
    exact = optax.adamw(1e-3, weight_decay=0.1)
    tx, wide = WIDE.make(), jax.tree.map(lambda x: x.astype(jnp.float32), params)
    state, expected_state = tx.init(params), exact.init(wide)
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        given = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
        expected, expected_state = exact.update(given, expected_state, wide)
        assert updates["w"].dtype == jnp.bfloat16
        rounded = expected["w"].astype(jnp.bfloat16)
        np.testing.assert_array_equal(updates["w"], rounded)
    assert {x.dtype for x in jax.tree.leaves(state[0].nu)} == {jnp.dtype("float32")}
