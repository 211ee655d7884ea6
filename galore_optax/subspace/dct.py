# SPDX-License-Identifier: Apache-2.0
"""Columns of one fixed basis, the discrete cosine transform, chosen by the gradient."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax.subspace._base import ByNumbers, Subspace, matmul


@dataclasses.dataclass(frozen=True)
class _DCT(ByNumbers):
    orthonormal: bool = dataclasses.field(default=True, init=False)

    def numbers(
        self,
        gradient: jax.Array,
        previous: jax.Array,
        key: jax.Array,
        cold: jax.Array,
    ) -> jax.Array:
        del key, cold
        size = len(gradient)
        every = self.columns(jnp.arange(size, dtype=jnp.uint32), size, gradient.dtype)
        energy = jnp.sum(matmul(every.T, gradient) ** 2, axis=1)
        _, chosen = lax.top_k(energy, previous.shape[1])
        return jnp.sort(chosen).astype(jnp.uint32)

    def columns(self, numbers: jax.Array, size: int, dtype: Any) -> jax.Array:
        wide = jnp.promote_types(dtype, jnp.float32)
        period = 4 * size
        odd = (2 * jnp.arange(size, dtype=jnp.uint32) + 1)[:, None]
        # Phases are exact: odd times a number, modulo the period, in pieces that fit
        # 32 bits; f32 would lose the angle of a large one.
        high, low = numbers[None] // 256, numbers[None] % 256
        phase = (odd * high % period * 256 + odd * low) % period
        angle = phase.astype(wide) * (2 * math.pi / period)
        length = jnp.where(numbers[None] == 0, 1, 2).astype(wide) / size
        return (jnp.sqrt(length) * jnp.cos(angle)).astype(dtype)


def dct() -> Subspace:
    r"""The columns of the discrete cosine transform that hold most of the gradient.

    .. math:: D_{ik} = \sqrt{(2 - [k = 0]) / m}\, \cos(\pi (2 i + 1) k / 2 m), \quad
        P = D_I, \quad I = \text{the } r \text{ rows of } D^T G
        \text{ of the greatest length},

    in their order. A refresh is one product, of (m, m) with (m, n), and a top-k; the
    state holds r indices, 4 bytes each, and both products of a step make the columns
    anew. Bases of two refreshes share columns or are orthogonal in them, so that
    `moments.rotate()` carries over what is kept and begins anew with the rest.

    Returns:
      a subspace method.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3), rank=4, subspace=galore_optax.subspace.dct(),
      ...     moments=galore_optax.moments.rotate())
      >>> tx.init({"kernel": jnp.ones((64, 256))}).projector["kernel"].nbytes
      16

    Source: Trion and DCT-AdamW, arXiv 2505.17967.
    """
    return _DCT()
