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
# Where two Newton-Schulz steps, error e -> 3/4 e², reach rounding.
_NEARLY = 1e-2
_SOUND = 1e-4


def condition(columns: jax.Array) -> jax.Array:
    """Columns of the same span, nearer to orthonormal; in f32 one pass of Cholesky QR.

    The shift bounds the condition of the factor by about the square root of its
    inverse, so that even dependent columns give finite ones.
    """
    squares = jnp.sum(columns**2, axis=0)
    columns = columns * jnp.where(squares > 0, lax.rsqrt(squares), 0)
    gram = matmul(columns.T, columns)
    shift = 4 * jnp.finfo(gram.dtype).eps * len(gram)
    lower = jnp.linalg.cholesky(gram + shift * jnp.eye(len(gram), dtype=gram.dtype))
    solved = jax.scipy.linalg.solve_triangular(lower, columns.T, lower=True).T
    return jnp.where(jnp.all(jnp.isfinite(solved)), solved, columns)


def cholesky_qr(columns: jax.Array) -> jax.Array:
    """An orthonormal basis of the span of `columns`, (m, rank), in their order."""

    def unfinished(state: tuple[jax.Array, jax.Array]) -> jax.Array:
        basis, passes = state
        return (_error(basis) > _NEARLY) & (passes < _PASSES)

    def once(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        basis, passes = state
        return condition(basis), passes + 1

    basis, _ = lax.while_loop(unfinished, once, (columns, jnp.int32(0)))
    basis = _polish(_polish(basis))
    return lax.cond(
        _error(basis) <= _SOUND, lambda: basis, lambda: orthonormalise(columns)
    )


def _error(basis: jax.Array) -> jax.Array:
    gram = matmul(basis.T, basis)
    return jnp.max(jnp.abs(gram - jnp.eye(len(gram), dtype=gram.dtype)))


def _polish(basis: jax.Array) -> jax.Array:
    """A Newton-Schulz step towards the nearest orthonormal basis."""
    gram = matmul(basis.T, basis)
    return 1.5 * basis - 0.5 * matmul(basis, gram)
