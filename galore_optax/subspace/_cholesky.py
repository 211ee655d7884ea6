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
from typing import NamedTuple

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
    products: jax.Array  # to come
    number: jax.Array  # of passes since the last product


def iterate(
    start: jax.Array,
    product: Callable[[jax.Array], jax.Array],
    products: int | jax.Array,
    noise: jax.Array,
) -> jax.Array:
    """An orthonormal basis of the rows of `product(... product(start))`, in order.

    Rows that depend on those before are replaced, by noise orthogonal to the others.

    Between products one pass of Cholesky QR keeps the rows apart; after the last as
    many as it takes. One loop, so that a pass is compiled once, with a loop of one turn
    or none around the product in it: of a batch of matrices (`jax.vmap`) a conditional
    would become a select, which computes products for passes too.

    Args:
      start: (rank, m).
      product: linear, of the same shape.
      products: how often, at least 1.
      noise: rows of about unit length without structure, of the same shape.

    Returns:
      (rank, m); not orthonormal, for the caller to refuse, where twelve passes were not
      enough.
    """

    def again(rows: jax.Array, left: jax.Array) -> jax.Array:
        turns = jnp.minimum(left, 1)
        return lax.fori_loop(0, turns, lambda _, x: product(x), rows)

    rows = product(start)
    left = _zero_of(rows) + jnp.asarray(products - 1, jnp.int32)
    return _completed(rows, noise, left, again)


def apart(rows: jax.Array) -> jax.Array:
    """One pass of Cholesky QR, which keeps rows from becoming one direction."""
    return _pass(rows, _gram(rows))


def complete(rows: jax.Array, noise: jax.Array) -> jax.Array:
    """As many passes as it takes, and `noise` for rows that depend on others."""
    return _completed(rows, noise, _zero_of(rows), lambda rows, _: rows)


def _completed(
    rows: jax.Array,
    noise: jax.Array,
    products: jax.Array,
    again: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """`again(rows, products)` takes a product after a pass, where one is left."""

    def unfinished(state: _Passes) -> jax.Array:
        apart = (_error(state.gram) <= _NEARLY) | (state.number >= _PASSES)
        return (state.products > 0) | ~apart

    def once(state: _Passes) -> _Passes:
        rows, left = _pass(state.rows, state.gram), state.products
        sound = jnp.abs(jnp.diagonal(state.gram) - 1) < 0.5  # false for NaN
        anew = (state.number > 0) & (state.number % _ANEW == 0)
        rows = jnp.where((sound | ~anew)[:, None], rows, noise)
        rows, last = again(rows, left), (left == 0).astype(jnp.int32)
        return _Passes(rows, _gram(rows), left - 1 + last, state.number + last)

    start = _Passes(rows, _gram(rows), products, _zero_of(rows))
    end = lax.while_loop(unfinished, once, start)
    return 1.5 * end.rows - 0.5 * matmul(end.gram, end.rows)


def _zero_of(rows: jax.Array) -> jax.Array:
    """No constant: inside `shard_map` a carry varies over devices from the start."""
    return 0 * jnp.isnan(rows[0, 0]).astype(jnp.int32)


# Compiled by itself, and in place, so that it is traced once a shape.
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
    inverse = inverse_factor(shifted)
    # What fails makes all that comes after it NaN.
    return jnp.where(jnp.isfinite(inverse[-1, -1]), matmul(inverse, unit), unit)


def inverse_factor(matrix: jax.Array) -> jax.Array:
    """`L⁻¹` of `L Lᵀ = matrix`, by elimination on `[matrix | I]`, a panel at a time."""
    size = len(matrix)
    panels = math.ceil(size / _PANEL)
    width = math.ceil(size / panels)
    padded = panels * width
    rows = lax.iota(jnp.int32, padded)
    cut = functools.partial(lax.dynamic_slice_in_dim, allow_negative_indices=False)

    def eliminate(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        first, both = state
        column = cut(both, first, width, 1)
        pivot = _inverse_factor(cut(column, first, width, 0))
        below = jnp.where(rows[:, None] >= first + width, column, 0)
        done = matmul(pivot, cut(both, first, width, 0))
        both = both - matmul(matmul(below, pivot.T), done)
        both = lax.dynamic_update_slice_in_dim(
            both, done, first, 0, allow_negative_indices=False
        )
        return first + width, both

    row, column = _places(padded, 2 * padded)
    ones = (column == row + padded) | ((column == row) & (row >= size))
    start = jnp.where(ones, 1, _in_corner(matrix, ones.shape))
    # Counts rows and not panels, or their product is one more kernel to compile.
    _, both = lax.while_loop(
        lambda state: state[0] < padded, eliminate, (jnp.int32(0), start)
    )
    return both[:size, padded : padded + size]


def _inverse_factor(matrix: jax.Array) -> jax.Array:
    """`L⁻¹` from one factorisation: that of `[[A, I], [I, c I]]` holds `L⁻ᵀ` below `L`.

    A triangular solve would do, but BLAS starts threads for it whatever its size. The
    upper triangle is not read.
    """
    size = len(matrix)
    large = float(jnp.finfo(matrix.dtype).eps) ** -2  # over any entry of the inverse
    row, column = _places(2 * size, 2 * size)
    scaled = jnp.where((row == column) & (row >= size), large, 0)
    # One array, which no turn of a loop around this makes anew.
    frame = jnp.where(row == column + size, 1, scaled).astype(matrix.dtype)
    both = frame + _in_corner(matrix, row.shape)
    return lax.linalg.cholesky(both, symmetrize_input=False)[size:, :size].T


def _places(*shape: int) -> tuple[jax.Array, jax.Array]:
    """The row and the column of each entry."""
    row, column = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    return row, column


def _in_corner(matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """With zeros to the right and below."""
    sizes = zip(matrix.shape, shape, strict=True)
    return jnp.pad(matrix, [(0, size - old) for old, size in sizes])


def _gram(rows: jax.Array) -> jax.Array:
    return matmul(rows, rows.T)


def _error(gram: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(gram - jnp.eye(len(gram), dtype=gram.dtype)))
