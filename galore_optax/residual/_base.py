# SPDX-License-Identifier: Apache-2.0
"""The protocol of a residual, and what residuals share."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from galore_optax._types import Scalar


@dataclasses.dataclass(frozen=True)
class Step:
    """One leaf at one step, a batch of matrices: `G`, `R = PᵀG` and `N = inner(R)`.

    Columns are those of the side that is not projected.
    """

    gradient: jax.Array  # G, the leaf's shape, f32 at least
    coordinates: jax.Array  # R
    direction: jax.Array  # N, before the learning rate
    scale: Any  # that P N is multiplied by
    lift: Callable[[jax.Array], jax.Array]  # R -> P R
    rank_axis: int  # of coordinates
    column_shape: tuple[int, ...]  # the leaf's, with 1 for the projected axes
    matrix_axes: tuple[int, ...]  # of the leaf, all that are no batch axes

    def lengths(self, coordinates: jax.Array) -> jax.Array:
        """The length of each column, in the leaf's axes."""
        square = jnp.sum(coordinates**2, axis=self.rank_axis)
        return jnp.sqrt(square).reshape(self.column_shape)

    def norms(self, full: jax.Array) -> jax.Array:
        """The Frobenius norm of each matrix, in the leaf's batch axes."""
        return jnp.sqrt(jnp.sum(full**2, axis=self.matrix_axes))

    def times(self, factors: jax.Array, full: jax.Array) -> jax.Array:
        """Each matrix times a factor of its own."""
        return jnp.expand_dims(factors, self.matrix_axes) * full


@runtime_checkable
class Residual(Protocol):
    """What is added to the lifted update of each projected leaf.

    Implementations must not be callable (`optax.inject_hyperparams` would call them); a
    frozen dataclass is not.
    """

    def of(self, step: Step, norms: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What is added, and what is remembered.

        Args:
          step: what is known.
          norms: (batch axes), f32: what was remembered, zeros at first.

        Returns:
          an array like the gradient, along the gradient: the learning rate that comes
          later turns it round; and the new norms.
        """
        ...


def limited(
    step: Step, full: jax.Array, norms: jax.Array, gamma: Scalar
) -> tuple[jax.Array, jax.Array]:
    """`full`, in norm at most gamma times what it was, and the norms it has then.

    A norm of zero stands for none, or a gradient of zero would end it for good.
    """
    found = step.norms(full)
    most = jnp.asarray(gamma, found.dtype) * norms.astype(found.dtype)
    grows = (norms > 0) & (found > most)
    factor = jnp.where(grows, most / jnp.where(grows, found, 1), 1)
    return step.times(factor, full), (factor * found).astype(norms.dtype)
