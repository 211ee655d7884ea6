# SPDX-License-Identifier: Apache-2.0
"""A basis drawn without looking at the gradient."""

import dataclasses
import math

import jax

from galore_optax.subspace._base import Subspace, orthonormalise


@dataclasses.dataclass(frozen=True)
class _Random:
    orthonormal: bool

    def basis(
        self,
        gradient: jax.Array,
        previous: jax.Array,
        key: jax.Array,
        cold: jax.Array,
    ) -> jax.Array:
        del cold
        rows, rank = previous.shape
        columns = jax.random.normal(key, (rows, rank), gradient.dtype)
        return (
            orthonormalise(columns) if self.orthonormal else columns / math.sqrt(rank)
        )


def random(*, orthonormal: bool = True) -> Subspace:
    """A random subspace, fresh at every refresh, from the key in the state.

    The cheapest method, and the one that captures least: `rank / m` of the energy in
    expectation.

    Args:
      orthonormal: `True` for an orthonormal basis of a uniformly random subspace;
        `False` for Gaussian entries of variance `1 / rank`, whose `P Pᵀ` is the
        identity in expectation but whose columns are not orthonormal.

    Returns:
      a subspace method.

    Example:
      >>> import galore_optax, optax
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3), rank=4, subspace=galore_optax.subspace.random())

    Source: Flora, arXiv 2402.03293; APOLLO, arXiv 2412.05270.
    """
    return _Random(orthonormal)
