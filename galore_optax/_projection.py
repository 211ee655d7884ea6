# SPDX-License-Identifier: Apache-2.0
"""Project and lift: `R = PᵀG` and `ΔW = scale · P U`, for batches of matrices.

With `proj_type="full"` there are two projectors, and `R = P₁ᵀ G P₂`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from galore_optax._matrices import Matrix, Side
from galore_optax._sharding import (
    explicit_sharding,
    leaf_sharding,
    letter_sharding,
    place,
    replicated,
)


def accumulation_dtype(*arrays: Any) -> jnp.dtype:
    """At least f32, f64 where an operand is."""
    dtype = jnp.dtype(jnp.float32)
    for array in arrays:
        dtype = jnp.promote_types(dtype, array.dtype)
    return dtype


def project(
    matrix: Matrix, projectors: Sequence[jax.Array], gradient: jax.Array
) -> jax.Array:
    """`PᵀG`: the projected axes of `gradient` replaced by one rank axis, in place."""
    sharding = explicit_sharding(gradient)
    for side, projector in zip(matrix.sides, projectors, strict=True):
        gradient = _contract(side.project, projector, gradient, sharding)
    return gradient


def lift(
    matrix: Matrix,
    projectors: Sequence[jax.Array],
    update: jax.Array,
    sharding: NamedSharding | None,
) -> jax.Array:
    """`P U`, of the shape of the leaf; `sharding` is its under an Explicit mesh."""
    pairs = list(zip(matrix.sides, projectors, strict=True))
    for side, projector in reversed(pairs):
        update = _contract(side.lift, projector, update, sharding)
    return update


def _contract(
    equation: str, projector: jax.Array, other: jax.Array, leaf: NamedSharding | None
) -> jax.Array:
    dtype = jnp.promote_types(projector.dtype, other.dtype)
    operands, result = equation.split("->")
    basis = letter_sharding(leaf, operands.split(",")[0]) if leaf else None
    return jnp.einsum(
        equation,
        place(projector, basis).astype(dtype),
        other.astype(dtype),
        preferred_element_type=accumulation_dtype(projector, other),
        out_sharding=letter_sharding(leaf, result),
    )


def initial_projector(
    matrix: Matrix, side: Side, leaf: Any, dtype: jnp.dtype
) -> jax.Array:
    """Orthonormal from the start: a slice of the identity for every matrix."""
    shape = matrix.projector_shape(side)
    one = shape[len(matrix.batch) :]
    basis = jnp.eye(math.prod(one[:-1]), matrix.rank, dtype=dtype).reshape(one)
    stacked = jnp.array(jnp.broadcast_to(basis, shape))  # a buffer of its own
    return place(stacked, replicated(leaf_sharding(leaf)))


def zero_coordinates(matrix: Matrix, leaf: Any, dtype: jnp.dtype) -> jax.Array:
    """Zeros shaped and sharded as `project` would shape and shard this leaf."""
    zeros = jnp.zeros(matrix.coordinate_shape, dtype)
    return place(zeros, letter_sharding(leaf_sharding(leaf), matrix.coordinate_letters))
