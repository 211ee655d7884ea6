# SPDX-License-Identifier: Apache-2.0
"""Subspace iteration that starts from the basis in use."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax.subspace._base import Subspace, rounded, rounded_einsum
from galore_optax.subspace._cholesky import iterate

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
        # Rows are the vectors from here on.
        noise = _noise(key, previous.shape[::-1]).astype(previous.dtype)
        start = jnp.where(cold, noise, previous.T + _NOISE * noise)
        steps = jnp.where(cold, self.cold_steps, self.steps)

        # A basis is orthonormal to f32's precision whatever it is the basis of; what
        # bf16 takes off the gradient here is a millionth of its energy.
        rough = rounded(gradient)

        def product(basis: jax.Array) -> jax.Array:
            # Transposed, bf16 takes XLA's CPU backend twice as long.
            coordinates = rounded_einsum("rm,mn->rn", basis, rough)
            return rounded_einsum("rn,mn->rm", coordinates, rough)

        return iterate(start, product, steps, noise).T


def _noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Unit rows of scrambled counters, the finaliser of MurmurHash3.

    Not `jax.random`: threefry, unrolled once for each leaf, was nine tenths of the
    compile time of a step, and any directions without structure will do here.
    """
    x = lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(0x9E3779B9) + key[0]
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B) + key[1]
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    x = lax.bitcast_convert_type(x ^ (x >> 16), jnp.int32)
    uniform = x.astype(jnp.float32) * (math.sqrt(3 / shape[1]) / 2**31)
    return uniform.reshape(shape)


def power(*, steps: int = 2, cold_steps: int = 5) -> Subspace:
    """Warm-started subspace iteration: `P ← qr(G (PᵀG)ᵀ)`, a few times.

    The default. Products and Cholesky factors only, where an SVD is serial; consecutive
    gradients share most of their leading subspace, so few steps do. The first basis of
    all starts from noise. Products with the gradient are of operands in bf16, added up
    in f32, the rest is in f32; with gradients in f64 all is.

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
