# SPDX-License-Identifier: Apache-2.0
"""A near-exact basis from a random sketch of the gradient."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.subspace._base import (
    Subspace,
    basis_by_products,
    matmul,
    orthonormalise,
)


@dataclasses.dataclass(frozen=True)
class _Randomized:
    oversample: int
    power_steps: int
    orthonormal: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.oversample < 0 or self.power_steps < 0:
            raise ValueError(
                f"randomized(oversample={self.oversample}, power_steps="
                f"{self.power_steps}): neither may be negative. 8 and 2 are usual."
            )

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
        return self.power_steps + 1

    def start(
        self, shape: tuple[int, ...], previous: jax.Array, key: jax.Array, cold: Any
    ) -> jax.Array:
        del cold
        width = min(previous.shape[1] + self.oversample, *shape)
        return jax.random.normal(key, (width, shape[0]), previous.dtype)

    def right(self, coordinates: jax.Array) -> jax.Array:
        # Orthonormalising on both sides keeps the small directions, which the square
        # of the gradient would lose to rounding.
        return orthonormalise(coordinates.T).T

    def between(self, rows: jax.Array) -> jax.Array:
        return orthonormalise(rows.T).T

    def finish(self, rows: jax.Array, rank: int, key: jax.Array) -> jax.Array:
        """The leading directions of `G Y Yᵀ`, with the rows of `Y` orthonormal."""
        del key
        wide = orthonormalise(rows.T)
        small = matmul(wide.T, rows.T)
        _, rotation = jnp.linalg.eigh(matmul(small, small.T))
        return orthonormalise(matmul(wide, rotation[:, ::-1][:, :rank]))


def randomized(*, oversample: int = 8, power_steps: int = 2) -> Subspace:
    """The randomized range finder: `P` from `G (GᵀG)^q Gᵀ Ω` with a Gaussian `Ω`.

    Needs no earlier basis, so its quality does not depend on how fast the gradient
    turns; `power` is cheaper where it turns slowly.

    Args:
      oversample: extra columns of the sketch, dropped at the end.
      power_steps: q, the number of further passes over the gradient and its transpose.

    Returns:
      a subspace method.

    Raises:
      ValueError: an argument is negative.

    Example:
      >>> import galore_optax, optax
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3), rank=4, subspace=galore_optax.subspace.randomized())

    Source: Halko, Martinsson and Tropp, 2011, arXiv 0909.4061, Algorithms 4.4 and 5.1.
    """
    return _Randomized(oversample, power_steps)
