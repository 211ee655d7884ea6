# SPDX-License-Identifier: Apache-2.0
"""A near-exact basis from a random sketch of the gradient."""

import dataclasses

import jax
import jax.numpy as jnp

from galore_optax.subspace._base import Subspace, matmul, orthonormalise


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
        del cold
        rank = previous.shape[-1]
        width = min(rank + self.oversample, *gradient.shape)
        test = jax.random.normal(key, (gradient.shape[1], width), gradient.dtype)
        wide = orthonormalise(matmul(gradient, test))
        for _ in range(self.power_steps):
            # Orthonormalising on both sides keeps the small directions, which the
            # square of the gradient would lose to rounding.
            right = orthonormalise(matmul(gradient.T, wide))
            wide = orthonormalise(matmul(gradient, right))
        small = matmul(wide.T, gradient)
        _, rotation = jnp.linalg.eigh(matmul(small, small.T))
        return orthonormalise(matmul(wide, rotation[:, ::-1][:, :rank]))


def randomized(*, oversample: int = 8, power_steps: int = 2) -> Subspace:
    """The randomized range finder: `P` from `(G Gᵀ)^q G Ω` with a Gaussian `Ω`.

    Needs no earlier basis, so its quality does not depend on how fast the gradient
    turns; `power` is cheaper where it turns slowly.

    Args:
      oversample: extra columns of the sketch, dropped at the end.
      power_steps: q, the number of passes over the gradient and its transpose.

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
