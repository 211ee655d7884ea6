# SPDX-License-Identifier: Apache-2.0
"""Scales in 16 bits."""

import jax
import jax.numpy as jnp


def round_up(x: jax.Array) -> jax.Array:
    """The least bf16 not below x >= 0, f32, so that x / scale <= 1."""
    return bfloat16(upper_bits(x))


def upper_bits(x: jax.Array) -> jax.Array:
    """Of `round_up(x)`, in uint16: these are ordered as what they stand for."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return ((bits + 0xFFFF) >> 16).astype(jnp.uint16)


def bfloat16(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
