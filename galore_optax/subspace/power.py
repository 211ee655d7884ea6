# SPDX-License-Identifier: Apache-2.0
"""Subspace iteration that starts from the basis in use."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax.subspace._base import Subspace
from galore_optax.subspace._cholesky import apart, complete, iterate

# A basis blind to some direction of the gradient would stay blind: G Gᵀ P never leaves
# a subspace that P does not touch. This much noise, relative to the unit columns of P,
# makes every direction reachable and costs 1e-4 of the energy before the first step.
_NOISE = 1e-2


@dataclasses.dataclass(frozen=True)
class _Power:
    steps: int
    cold_steps: int
    product_dtype: jnp.dtype
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
        # Not `basis_by_products`, for the products that are rounded.
        noise = _noise(key, previous.shape[::-1]).astype(previous.dtype)
        rounded = self._rounded(gradient)

        def product(basis: jax.Array) -> jax.Array:
            coordinates = self._einsum("rm,mn->rn", basis, rounded)
            return self._einsum("rn,mn->rm", coordinates, rounded)

        start = _beside(previous, noise, cold)
        return iterate(start, product, self.passes(cold), noise).T

    def passes(self, cold: jax.Array) -> jax.Array:
        return jnp.where(cold, self.cold_steps, self.steps)

    def start(
        self, shape: tuple[int, ...], previous: jax.Array, key: jax.Array, cold: Any
    ) -> jax.Array:
        del shape
        noise = _noise(key, previous.shape[::-1]).astype(previous.dtype)
        return _beside(previous, noise, cold)

    def right(self, coordinates: jax.Array) -> jax.Array:
        return coordinates

    def between(self, rows: jax.Array) -> jax.Array:
        return apart(rows)

    def finish(self, rows: jax.Array, rank: int, key: jax.Array) -> jax.Array:
        del rank
        return complete(rows, _noise(key, rows.shape).astype(rows.dtype)).T

    def _einsum(self, equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
        """Of rounded operands, added up in the dtype of `a`.

        Not `matmul`: of a transposed operand in bf16 it takes XLA's CPU backend twice
        as long.
        """
        return jnp.einsum(
            equation,
            self._rounded(a),
            self._rounded(b),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=a.dtype,
        )

    def _rounded(self, x: jax.Array) -> jax.Array:
        return x.astype(self.product_dtype) if x.dtype == jnp.float32 else x


def _beside(previous: jax.Array, noise: jax.Array, cold: Any) -> jax.Array:
    """Rows to start from: those in use with a little noise, or noise alone."""
    return jnp.where(cold, noise, previous.T + _NOISE * noise)


def _noise(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Unit rows of scrambled counters, the finaliser of MurmurHash3.

    Not `jax.random`: threefry, unrolled once for each leaf, was nine tenths of the
    compile time of a step, and any directions without structure will do here.
    """
    first, second = jax.random.key_data(key).ravel()[:2]
    x = lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(0x9E3779B9) + first
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B) + second
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    x = lax.bitcast_convert_type(x ^ (x >> 16), jnp.int32)
    uniform = x.astype(jnp.float32) * (math.sqrt(3 / shape[1]) / 2**31)
    return uniform.reshape(shape)


def power(
    *, steps: int = 2, cold_steps: int = 5, product_dtype: Any = jnp.bfloat16
) -> Subspace:
    """Warm-started subspace iteration: `P ← qr(G (PᵀG)ᵀ)`, a few times.

    The default. Products and Cholesky factors only, where an SVD is serial; consecutive
    gradients share enough of their leading subspace that few steps do. The first basis
    of all starts from noise.

    The products with G take most of the time. Their operands are rounded to bf16 and
    added up in f32: that moves the basis by less than one step would, and all else,
    orthonormality with it, is in f32. It also lets last bits of the gradient, in which
    two programs for the same step may differ, reach the fourth digit of the basis.
    Gradients in f64 are not rounded.

    Args:
      steps: iterations at a refresh.
      cold_steps: iterations at a matrix's first refresh.
      product_dtype: of the operands; `jnp.float32` where bf16 is slow.

    Returns:
      a subspace method.

    Raises:
      ValueError: a number of steps is below 1, or the dtype is not a floating one.

    Example:
      >>> import galore_optax, optax
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3), rank=4, subspace=galore_optax.subspace.power(steps=1))

    Source: orthogonal iteration, Golub and Van Loan, Matrix Computations, 8.2.4.
    """
    dtype = jnp.dtype(product_dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"power(product_dtype={dtype}): products need a floating dtype, such as"
            " jnp.bfloat16 or jnp.float32."
        )
    return _Power(steps, cold_steps, dtype)
