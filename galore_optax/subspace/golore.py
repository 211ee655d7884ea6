# SPDX-License-Identifier: Apache-2.0
"""The gradient's own subspace early in training, and a random one late."""

import dataclasses

import jax
from jax import lax

from galore_optax.subspace._base import Subspace
from galore_optax.subspace.power import power
from galore_optax.subspace.random import random


@dataclasses.dataclass(frozen=True)
class _GoLore:
    random_from: int
    first: Subspace

    def __post_init__(self) -> None:
        if isinstance(self.random_from, bool) or not self.random_from > 0:
            raise ValueError(
                f"golore(random_from={self.random_from!r}) must be the number of a step"
                " after the first, such as 80 per cent of all. Random from the start is"
                " galore_optax.subspace.random()."
            )
        if not self.first.orthonormal:
            raise ValueError(
                f"golore(first={self.first!r}): its bases are not orthonormal, and the"
                " random ones that follow are: updates would change their size."
            )

    @property
    def orthonormal(self) -> bool:
        return True

    def basis(
        self,
        gradient: jax.Array,
        previous: jax.Array,
        key: jax.Array,
        cold: jax.Array,
    ) -> jax.Array:
        return self.first.basis(gradient, previous, key, cold)

    def basis_at(
        self,
        step: jax.Array,
        gradient: jax.Array,
        previous: jax.Array,
        key: jax.Array,
        cold: jax.Array,
    ) -> jax.Array:
        given = gradient, previous, key, cold
        late = step >= self.random_from
        return lax.cond(late, random().basis, self.first.basis, *given)


def golore(*, random_from: int, first: Subspace | None = None) -> Subspace:
    """The subspace of the gradient, and from a step on a random one.

    Near a minimum the leading directions of a stochastic gradient are those of its
    noise, and GaLore need not converge; with random subspaces it does. Early on they
    learn slower, as they capture `rank / m` of the energy only. Published with moments
    that are projected on each new basis, `moments.transfer()`, and `random_from` at 80
    per cent of all steps.

    Args:
      random_from: the step from which refreshes draw a basis.
      first: the method until then; `power()` if `None`.

    Returns:
      a subspace method.

    Raises:
      ValueError: `random_from` is below 1, or `first` is not orthonormal.

    Example:
      >>> import galore_optax, optax
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3), rank=4,
      ...     subspace=galore_optax.subspace.golore(random_from=8000),
      ...     moments=galore_optax.moments.transfer())

    Source: He et al., GoLore, arXiv 2410.11289.
    """
    return _GoLore(random_from, power() if first is None else first)
