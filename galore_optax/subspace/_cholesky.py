# SPDX-License-Identifier: Apache-2.0
"""Orthonormal columns from Cholesky factors: products, where Householder QR is serial.

Plain Cholesky QR breaks down on gradients, whose products `G Gᵀ P` have condition
numbers up to 4e9. Three things make it safe: columns are first scaled to unit length,
which takes most of that condition away when the basis is warm; a shift keeps the factor
real and the pass is repeated; and Householder QR stands by for what is left.
"""

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax.subspace._base import matmul, orthonormalise

_PASSES = 6
# Where one Newton-Schulz step, error e -> 3/4 e², reaches rounding.
_NEARLY = 1e-3


def condition(columns: jax.Array) -> jax.Array:
    """Columns of the same span, nearer to orthonormal: one pass of Cholesky QR."""
    return _pass(columns, _gram(columns))


def cholesky_qr(columns: jax.Array) -> jax.Array:
    """An orthonormal basis of the span of `columns`, (m, rank), in their order."""

    def unfinished(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        _, gram, passes = state
        return (_error(gram) > _NEARLY) & (passes < _PASSES)

    def once(
        state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        basis, gram, passes = state
        basis = _pass(basis, gram)
        return basis, _gram(basis), passes + 1

    start = columns, _gram(columns), jnp.int32(0)
    basis, gram, _ = lax.while_loop(unfinished, once, start)
    return lax.cond(
        _error(gram) <= _NEARLY,  # false for NaN
        lambda: 1.5 * basis - 0.5 * matmul(basis, gram),
        lambda: orthonormalise(columns),
    )


def _pass(columns: jax.Array, gram: jax.Array) -> jax.Array:
    """Unit columns times the inverse Cholesky factor of their shifted Gram matrix.

    The shift bounds the condition of the factor by about the square root of its
    inverse, so that even dependent columns give finite ones.
    """
    squares = jnp.diagonal(gram)
    scale = jnp.where(squares > 0, lax.rsqrt(squares), 0)
    shift = 4 * jnp.finfo(gram.dtype).eps * len(gram)
    shifted = gram * scale[:, None] * scale + shift * jnp.eye(
        len(gram), dtype=gram.dtype
    )
    lower = jnp.linalg.cholesky(shifted)
    unit = columns * scale
    solved = jax.scipy.linalg.solve_triangular(lower, unit.T, lower=True).T
    return jnp.where(jnp.all(jnp.isfinite(solved)), solved, unit)


def _gram(columns: jax.Array) -> jax.Array:
    return matmul(columns.T, columns)


def _error(gram: jax.Array) -> jax.Array:
    return jnp.max(jnp.abs(gram - jnp.eye(len(gram), dtype=gram.dtype)))
