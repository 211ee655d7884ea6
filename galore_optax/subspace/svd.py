# SPDX-License-Identifier: Apache-2.0
"""The exact basis by singular value decomposition, as in the reference."""

import dataclasses

import jax
import jax.numpy as jnp

from galore_optax.subspace._base import Subspace


@dataclasses.dataclass(frozen=True)
class _SVD:
    orthonormal: bool = dataclasses.field(default=True, init=False)

    def basis(
        self,
        gradient: jax.Array,
        previous: jax.Array,
        key: jax.Array,
        cold: jax.Array,
    ) -> jax.Array:
        del key, cold
        u, _, _ = jnp.linalg.svd(gradient, full_matrices=False)
        return u[:, : previous.shape[-1]]


def svd() -> Subspace:
    """The leading left singular vectors, `P = U[:, :rank]` with `G = U S Vᵀ`.

    Exact, and slow: the choice for parity with the reference, not for training. `eigh`
    gives the same subspace several times faster.

    Returns:
      a subspace method.

    Example:
      >>> import galore_optax, optax
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3), rank=4, subspace=galore_optax.subspace.svd())

    Source: GaLore, arXiv 2403.03507, Algorithm 2.
    """
    return _SVD()
