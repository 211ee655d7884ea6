# SPDX-License-Identifier: Apache-2.0
"""Orthonormal rows from Cholesky factors: products, where Householder QR is serial.

Plain Cholesky QR breaks down on gradients, whose products `G Gᵀ P` have condition
numbers up to 4e9. Three things make it safe: vectors are first scaled to unit length,
which takes most of that condition away when the basis is warm; a shift keeps the factor
real and the pass is repeated; and vectors that depend on the others, as they do where
the gradient has a smaller rank, begin anew from noise. Householder QR would need none
of it, but takes minutes to compile for TPUs.

Vectors are rows here: both products of a power step then read the gradient and the
basis as they lie in memory.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax.subspace._base import matmul

_PASSES = 12
_ANEW = 4  # after so many passes, rows whose length is far from 1 are given up
# Where one Newton-Schulz step, error e -> 3/4 e², reaches rounding.
_NEARLY = 1e-3
# The threads of the BLAS behind LAPACK keep spinning after a call, and products beside
# them take twice as long (`speed/blas_threads`). OpenBLAS starts none for a
# factorisation of fewer than 40,000 entries; here it is of twice this many rows.
_PANEL = 96


class _Passes(NamedTuple):
    rows: jax.Array
    gram: jax.Array
    number: jax.Array


def iterate(
    start: jax.Array,
    product: Callable[[jax.Array], jax.Array],
    products: int | jax.Array,
    noise: jax.Array,
) -> jax.Array:
    """An orthonormal basis of the rows of `product(... product(start))`, in order.

    Rows that depend on those before are replaced, by noise orthogonal to the others.

    Between products one pass of Cholesky QR keeps the rows apart; after the last as
    many as it takes. Two loops, so that a batch of matrices (`jax.vmap`) runs as many
    products as one does: a conditional in a single loop would become a select, which
    computes both.

    Args:
      start: (rank, m).
      product: linear, of the same shape.
      products: how often, at least 1.
      noise: rows of about unit length without structure, of the same shape.

    Returns:
      (rank, m); not orthonormal, for the caller to refuse, where twelve passes were not
      enough.
    """

    def again(_: Any, rows: jax.Array) -> jax.Array:
        return product(apart(rows))

    left = jnp.asarray(products - 1, jnp.int32)
    rows = lax.fori_loop(0, left, again, product(start))
    return complete(rows, noise)


def apart(rows: jax.Array) -> jax.Array:
    """One pass of Cholesky QR, which keeps rows from becoming one direction."""
    return _pass(rows, _gram(rows))


def complete(rows: jax.Array, noise: jax.Array) -> jax.Array:
    """As many passes as it takes, and `noise` for rows that depend on others."""

    def unfinished(state: _Passes) -> jax.Array:
        return (_error(state.gram) > _NEARLY) & (state.number < _PASSES)

    def once(state: _Passes) -> _Passes:
        rows = _pass(state.rows, state.gram)
        sound = jnp.abs(jnp.diagonal(state.gram) - 1) < 0.5  # false for NaN
        anew = (state.number > 0) & (state.number % _ANEW == 0)
        rows = jnp.where((sound | ~anew)[:, None], rows, noise)
        return _Passes(rows, _gram(rows), state.number + 1)

    # No constant: inside `shard_map` a carry varies over devices from the start.
    none = 0 * jnp.isnan(rows[0, 0]).astype(jnp.int32)
    end = lax.while_loop(unfinished, once, _Passes(rows, _gram(rows), none))
    return 1.5 * end.rows - 0.5 * matmul(end.gram, end.rows)


# Compiled by themselves, and in place, so that they are traced once for both loops.
@functools.partial(jax.jit, inline=True)
def _pass(rows: jax.Array, gram: jax.Array) -> jax.Array:
    """The inverse Cholesky factor of the shifted Gram matrix times unit rows.

    The shift bounds the condition of the factor by about the square root of its
    inverse, so that even dependent rows give finite ones.
    """
    squares = jnp.diagonal(gram)
    scale = jnp.where(squares > 0, lax.rsqrt(squares), 0)
    shift = 4 * jnp.finfo(gram.dtype).eps * len(gram)
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    shifted = gram * scale[:, None] * scale[None] + shift * identity
    unit = rows * scale[:, None]
    solved = matmul(inverse_factor(shifted), unit)
    return jnp.where(jnp.all(jnp.isfinite(solved)), solved, unit)


def inverse_factor(matrix: jax.Array) -> jax.Array:
    """`L⁻¹` of `L Lᵀ = matrix`, by elimination on `[matrix | I]`, a panel at a time."""
    size = len(matrix)
    panels = math.ceil(size / _PANEL)
    width = math.ceil(size / panels)
    padded = panels * width
    left = jnp.eye(padded, dtype=matrix.dtype).at[:size, :size].set(matrix)
    rows = lax.iota(jnp.int32, padded)

    def eliminate(panel: jax.Array, both: jax.Array) -> jax.Array:
        first = panel * width
        column = lax.dynamic_slice_in_dim(both, first, width, 1)
        pivot = _inverse_factor(lax.dynamic_slice_in_dim(column, first, width, 0))
        below = jnp.where(rows[:, None] >= first + width, column, 0)
        done = matmul(pivot, lax.dynamic_slice_in_dim(both, first, width, 0))
        both = both - matmul(matmul(below, pivot.T), done)
        return lax.dynamic_update_slice_in_dim(both, done, first, 0)

    both = jnp.concatenate([left, jnp.eye(padded, dtype=matrix.dtype)], axis=1)
    both = lax.fori_loop(0, panels, eliminate, both)
    return both[:size, padded : padded + size]


def _inverse_factor(matrix: jax.Array) -> jax.Array:
    """`L⁻¹` from one factorisation: that of `[[A, I], [I, c I]]` holds `L⁻ᵀ` below `L`.

    A triangular solve would do, but BLAS starts threads for it whatever its size.
    """
    size = len(matrix)
    large = float(jnp.finfo(matrix.dtype).eps) ** -2  # over any entry of the inverse
    both = jnp.eye(2 * size, dtype=matrix.dtype) * large
    both = both.at[:size, :size].set(matrix)
    both = both.at[size:, :size].set(jnp.eye(size, dtype=matrix.dtype))
    return lax.linalg.cholesky(both, symmetrize_input=False)[size:, :size].T


def _gram(rows: jax.Array) -> jax.Array:
    return matmul(rows, rows.T)


def _error(gram: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(gram - jnp.eye(len(gram), dtype=gram.dtype)))
