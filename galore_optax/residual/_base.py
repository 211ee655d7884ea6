# SPDX-License-Identifier: Apache-2.0
"""The protocol of a residual, and what residuals share."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from galore_optax._types import Scalar


class Added(NamedTuple):
    """`G diag(columns) + P coordinates`, lifted by the product of the update itself."""

    columns: jax.Array  # of the leaf's axes, 1 for projected ones
    coordinates: jax.Array | None  # `None` for nothing inside the subspace


@dataclasses.dataclass(frozen=True)
class Step:
    """One leaf at one step, a batch of matrices: `G`, `R = PᵀG` and `N = inner(R)`.

    Columns are those of the side that is not projected.
    """

    gradient: jax.Array  # G, the leaf's shape, f32 at least
    coordinates: jax.Array  # R
    direction: jax.Array  # N, before the learning rate
    scale: Any  # of the update
    gram: Callable[[jax.Array], jax.Array]  # R -> Pᵀ P R
    projected: tuple[int, ...]  # axes of the leaf
    others: tuple[int, ...]  # axes of the other side
    rank_axis: int  # of coordinates, which have it in place of the projected axes

    def lengths(self, coordinates: jax.Array) -> jax.Array:
        """The length of each column, in the axes of `Added.columns`."""
        return jnp.sqrt(self._products(coordinates, coordinates))

    def of_matrix(self, lengths: jax.Array) -> jax.Array:
        """Of the lengths of the columns of each matrix, its own."""
        square = jnp.sum(lengths**2, (*self.projected, *self.others), keepdims=True)
        return jnp.sqrt(square)

    def over_rank(self, columns: jax.Array) -> jax.Array:
        """Columns, as they multiply coordinates."""
        sizes = [
            x for axis, x in enumerate(columns.shape) if axis not in self.projected
        ]
        return columns.reshape(*sizes[: self.rank_axis], 1, *sizes[self.rank_axis :])

    def norms(self, added: Added) -> jax.Array:
        """The Frobenius norm of each matrix of `added`, in the leaf's batch axes.

        By `|G a + P C|² = |G|² a² + 2 a R·C + C·PᵀP C`, column by column.
        """
        columns, low = added
        square = columns**2 * jnp.sum(self.gradient**2, self.projected, keepdims=True)
        if low is not None:
            square += 2 * columns * self._products(self.coordinates, low)
            square += self._products(low, self.gram(low))
        total = jnp.sum(square, axis=(*self.projected, *self.others))
        return jnp.sqrt(jnp.maximum(total, 0))  # a difference of rounded sums

    def times(self, factors: jax.Array, added: Added) -> Added:
        """Each matrix of `added` times a factor of its own."""
        columns = jnp.expand_dims(factors, (*self.projected, *self.others))
        low = added.coordinates
        inside = None if low is None else low * self.over_rank(columns)
        return Added(added.columns * columns, inside)

    def _products(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Of column with column."""
        found = jnp.sum(a * b, axis=self.rank_axis)
        shape = [
            1 if axis in self.projected else size
            for axis, size in enumerate(self.gradient.shape)
        ]
        return found.reshape(shape)


@runtime_checkable
class Residual(Protocol):
    """What is added to the lifted update of each projected leaf.

    Implementations must not be callable (`optax.inject_hyperparams` would call them); a
    frozen dataclass is not.

    Attributes:
      instead: whether it takes the place of the lifted update `P N`, which is then not
        computed.
    """

    @property
    def instead(self) -> bool: ...

    def of(self, step: Step, norms: jax.Array) -> tuple[Added, jax.Array]:
        """What is added, and what is remembered.

        Args:
          step: what is known.
          norms: (batch axes), f32: what was remembered, zeros at first.

        Returns:
          what is added, along the gradient: the learning rate that comes later turns it
          round; and the new norms.
        """
        ...


def check_gamma(name: str, gamma: Any) -> None:
    """Raises unless norms may grow by `gamma` in a step."""
    if not isinstance(gamma, jax.Array) and not gamma > 1:
        raise ValueError(
            f"{name}(gamma={gamma!r}) must be a number above 1, by which the norm may"
            " grow in a step, such as 1.01, or math.inf."
        )


def check_word(name: str, argument: str, word: Any, known: Sequence[str]) -> None:
    """Raises unless `word` is one of those that an argument may be."""
    if word not in known:
        raise ValueError(
            f"{name}({argument}={word!r}) must be one of {', '.join(map(repr, known))}."
        )


def limited(
    step: Step, added: Added, norms: jax.Array, gamma: Scalar
) -> tuple[Added, jax.Array]:
    """`added`, in norm at most gamma times what it was, and the norms it has then.

    A norm of zero stands for none, or a gradient of zero would end it for good.
    """
    found = step.norms(added)
    most = jnp.asarray(gamma, found.dtype) * norms.astype(found.dtype)
    grows = (norms > 0) & (found > most)
    factor = jnp.where(grows, most / jnp.where(grows, found, 1), 1)
    return step.times(factor, added), (factor * found).astype(norms.dtype)
