# SPDX-License-Identifier: Apache-2.0
"""Subspace iteration that starts from the basis in use."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax.subspace._base import Subspace, matmul, orthonormalise

# A basis blind to some direction of the gradient would stay blind: G Gᵀ P never leaves
# a subspace that P does not touch. This much noise, relative to the unit columns of P,
# makes every direction reachable and costs 1e-4 of the energy before the first step.
_NOISE = 1e-2


@dataclasses.dataclass(frozen=True)
class _Power:
    steps: int
    cold_steps: int
    orthonormal: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.cold_steps < 1:
            raise ValueError(
                f"power(steps={self.steps}, cold_steps={self.cold_steps}): both must be"
                " at least 1, or the basis would never change."
            )

    def basis(
        self,
        gradient: jax.Array,
        previous: jax.Array,
        key: jax.Array,
        cold: jax.Array,
    ) -> jax.Array:
        noise = jax.random.normal(key, previous.shape, previous.dtype)
        noise = noise / math.sqrt(previous.shape[0])
        start = jnp.where(cold, noise, previous + _NOISE * noise)
        steps = jnp.where(cold, self.cold_steps, self.steps)

        def step(_: jax.Array, basis: jax.Array) -> jax.Array:
            coordinates = matmul(basis.T, gradient)
            return orthonormalise(matmul(gradient, coordinates.T))

        return lax.fori_loop(0, steps, step, start)


def power(*, steps: int = 2, cold_steps: int = 5) -> Subspace:
    """Warm-started subspace iteration: `P ← qr(G (PᵀG)ᵀ)`, a few times.

    The default. Two products and one QR a step; consecutive gradients share most of
    their leading subspace, so few steps do. The first basis of all starts from noise.

    Args:
      steps: iterations at a refresh.
      cold_steps: iterations at a matrix's first refresh.

    Returns:
      a subspace method.

    Raises:
      ValueError: an argument is below 1.

    Example:
      >>> import galore_optax, optax
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3), rank=4, subspace=galore_optax.subspace.power(steps=1))

    Source: orthogonal iteration, Golub and Van Loan, Matrix Computations, 8.2.4.
    """
    return _Power(steps, cold_steps)
