# SPDX-License-Identifier: Apache-2.0
"""A basis drawn without looking at the gradient."""

import dataclasses
import math
from typing import Any

import jax

from galore_optax.subspace._base import Subspace, basis_by_products, orthonormalise


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
        return basis_by_products(self, gradient, previous, key, cold)

    def passes(self, cold: jax.Array) -> int:
        del cold
        return 0

    def start(
        self, shape: tuple[int, ...], previous: jax.Array, key: jax.Array, cold: Any
    ) -> jax.Array:
        del shape, cold
        return jax.random.normal(key, previous.shape, previous.dtype).T

    def right(self, coordinates: jax.Array) -> jax.Array:
        return coordinates

    def between(self, rows: jax.Array) -> jax.Array:
        return rows

    def finish(self, rows: jax.Array, rank: int, key: jax.Array) -> jax.Array:
        del key
        return orthonormalise(rows.T) if self.orthonormal else rows.T / math.sqrt(rank)


def random(*, orthonormal: bool = True) -> Subspace:
    """A random subspace, fresh at every refresh, from the key in the state.

    The cheapest method, and the one that captures least: `rank / m` of the energy in
    expectation.

    Args:
      orthonormal: `True` for an orthonormal basis of a uniformly random subspace;
        `False` for Gaussian entries of variance `1 / rank`, whose `P Pᵀ` is the
        identity in expectation but whose columns are not orthonormal; `gaussian`
        has the same ones, and stores seeds in their place.

    Returns:
      a subspace method.

    Example:
      >>> import galore_optax, optax
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3), rank=4, subspace=galore_optax.subspace.random())

    Source: Flora, arXiv 2402.03293; APOLLO, arXiv 2412.05270.
    """
    return _Random(orthonormal)
