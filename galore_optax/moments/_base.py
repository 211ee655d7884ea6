# SPDX-License-Identifier: Apache-2.0
"""The protocol of what is done with moments at a refresh."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax


class Moment(NamedTuple):
    """One array of the inner's state, in coordinates, f32 at least."""

    value: jax.Array
    initial: jax.Array  # what the inner's `init` makes of it
    signed: bool  # a mean of gradients; else one of their squares
    # Of a mean of squares, the mean of the gradients themselves, at its own age: times
    # sqrt((1 - b2ᵗ)) / (1 - b1ᵗ). Zero where the inner holds none.
    mean: Any
    turned: Callable[[jax.Array], jax.Array]  # x -> Q x, with Q = P_newᵀ P_old
    turned_squares: Callable[[jax.Array], jax.Array]  # x -> (Q ∘ Q) x


@runtime_checkable
class AtRefresh(Protocol):
    """What is done with the moments of a matrix that took a new basis.

    Implementations must not be callable (`optax.inject_hyperparams` would call them); a
    frozen dataclass is not.

    Attributes:
      moves: whether moments are changed at all; if not, no step holds code for it.
      turns: whether `Q` is asked for, which needs to know what each array of the state
        is.
      rotates: whether `Q` has to be near a rotation, as between orthonormal bases.
      align_signs: whether each column of a new basis gets the sign that makes its
        product with the old one positive.
    """

    @property
    def moves(self) -> bool: ...

    @property
    def turns(self) -> bool: ...

    @property
    def rotates(self) -> bool: ...

    @property
    def align_signs(self) -> bool: ...

    def moved(self, moment: Moment) -> jax.Array:
        """The moment in the new basis, of the shape of its value."""
        ...
