# SPDX-License-Identifier: Apache-2.0
"""In how many directions coordinates spread."""

import jax
import jax.numpy as jnp

from galore_optax._selection.matrices import Matrix
from galore_optax._xla.sharding import everywhere


def effective_rank(matrix: Matrix, coordinates: jax.Array) -> jax.Array:
    r"""`|R|⁴ / |R Rᵀ|²`, of the batch shape: (Σλ)² / Σλ² of the eigenvalues of R Rᵀ.

    The same from either side, so that of two rank axes any will do. By one product and
    no decomposition.
    """
    low = matrix.coordinate_letters
    batch = "".join(x for x in low if x in _batch_letters(matrix))
    rank = next(x for x in low if x.isupper())
    whole = everywhere(coordinates)
    whole = whole / _or_one(jnp.max(jnp.abs(whole), initial=0))
    gram = jnp.einsum(f"{low},{low.replace(rank, 'X')}->{batch}{rank}X", whole, whole)
    return jnp.trace(gram, axis1=-2, axis2=-1) ** 2 / jnp.sum(gram**2, (-2, -1))


def _batch_letters(matrix: Matrix) -> list[str]:
    return [matrix.leaf_letters[axis] for axis in matrix.batch]


def _or_one(largest: jax.Array) -> jax.Array:
    return jnp.where(largest > 0, largest, 1)
