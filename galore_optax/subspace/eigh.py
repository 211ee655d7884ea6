# SPDX-License-Identifier: Apache-2.0
"""The exact basis from the eigenvectors of the smaller Gram matrix."""

import dataclasses

import jax
import jax.numpy as jnp

from galore_optax.subspace._base import Subspace, matmul, orthonormalise


@dataclasses.dataclass(frozen=True)
class _Eigh:
    orthonormal: bool = dataclasses.field(default=True, init=False)

    def basis(
        self,
        gradient: jax.Array,
        previous: jax.Array,
        key: jax.Array,
        cold: jax.Array,
    ) -> jax.Array:
        del key, cold
        rank = previous.shape[-1]
        rows, cols = gradient.shape
        if rows <= cols:
            return _leading(matmul(gradient, gradient.T), rank)
        right = _leading(matmul(gradient.T, gradient), rank)
        return orthonormalise(matmul(gradient, right))


def _leading(gram: jax.Array, rank: int) -> jax.Array:
    _, vectors = jnp.linalg.eigh(gram)  # eigenvalues ascend
    return vectors[:, ::-1][:, :rank]


def eigh() -> Subspace:
    """The leading eigenvectors of `G Gᵀ`, or of `GᵀG` where that is smaller.

    The same subspace as `svd`. Squaring loses the directions whose singular value is
    below about 3e-4 of the largest (f32), which hold less than 1e-7 of the energy.

    Returns:
      a subspace method.

    Example:
      >>> import galore_optax, optax
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3), rank=4, subspace=galore_optax.subspace.eigh())

    Source: `G Gᵀ = U S² Uᵀ`.
    """
    return _Eigh()
