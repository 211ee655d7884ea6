# SPDX-License-Identifier: Apache-2.0
"""A Gaussian basis that is drawn anew beside each product, and not stored."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.subspace._base import ByNumbers, Subspace


@dataclasses.dataclass(frozen=True)
class _Gaussian(ByNumbers):
    orthonormal: bool = dataclasses.field(default=False, init=False)

    def numbers(
        self,
        gradient: jax.Array,
        previous: jax.Array,
        key: jax.Array,
        cold: jax.Array,
    ) -> jax.Array:
        del gradient, cold
        # In sequence, so that no two columns of a matrix are the same.
        rank = previous.shape[1]
        first = jax.random.bits(key, (), jnp.uint32)
        return first + jnp.arange(rank, dtype=jnp.uint32)

    def columns(self, numbers: jax.Array, size: int, dtype: Any) -> jax.Array:
        # In f32 whatever the dtype is, which would draw other numbers.
        drawn = jax.vmap(_normal, (0, None), 1)(numbers, size)
        return (drawn / math.sqrt(len(numbers))).astype(dtype)


def _normal(seed: jax.Array, size: int) -> jax.Array:
    # Of one generator, whichever is JAX's default where a run is resumed.
    words = jnp.stack([jnp.zeros_like(seed), seed])
    key = jax.random.wrap_key_data(words, impl="threefry2x32")
    return jax.random.normal(key, (size,), jnp.float32)


def gaussian() -> Subspace:
    r"""Columns of independent Gaussian entries, stored as a seed each.

    .. math:: P_{ij} \sim N(0, 1 / r), \quad E[P P^T] = I,

    fresh at every refresh, from the key in the state: as `random(orthonormal=False)`,
    but 4 bytes a column are stored, whatever its length, and both products of a step
    draw the columns anew. The basis looks at no gradient and is not orthonormal, so
    that moments are kept or transferred and not rotated.

    Returns:
      a subspace method.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3), rank=4, subspace=galore_optax.subspace.gaussian())
      >>> state = tx.init({"kernel": jnp.ones((64, 256))})
      >>> state.projector["kernel"].nbytes
      16

    Source: Flora, arXiv 2402.03293; APOLLO, arXiv 2412.05270.
    """
    return _Gaussian()
