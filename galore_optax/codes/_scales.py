# SPDX-License-Identifier: Apache-2.0
"""Scales in 16 bits."""

import jax
import jax.numpy as jnp


def round_up(x: jax.Array) -> jax.Array:
    """The least bf16 not below x >= 0, f32, so that x / scale <= 1."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    upper = ((bits + 0xFFFF) >> 16).astype(jnp.uint16)
    return jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
