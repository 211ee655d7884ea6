# SPDX-License-Identifier: Apache-2.0
"""Projectors stored as one number a column, from which each product makes them anew."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax._storage.projectors import describe_numbers
from galore_optax.subspace import ByNumbers


@dataclasses.dataclass(frozen=True)
class Numbers:
    """(*batch axes, 1, rank), uint32: what `method` makes columns of.

    A basis is never stored: `found` in place of `encode` makes new numbers.
    """

    method: ByNumbers

    def initial(self, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        del dtype
        return jnp.arange(shape[-1], dtype=jnp.uint32)[None]

    def found(
        self, gradient: jax.Array, old: Any, key: jax.Array, cold: jax.Array
    ) -> jax.Array:
        """The numbers of a new basis of one matrix, as `old` holds them."""
        shape = len(gradient), old.shape[-1]
        previous = self.decode(old, shape, gradient.dtype)
        return self.method.numbers(gradient, previous, key, cold).reshape(old.shape)

    def encode(self, basis: jax.Array, old: Any) -> jax.Array:
        raise TypeError(f"a basis of {self.method!r} is found by its numbers.")

    def decode(
        self, stored: Any, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> jax.Array:
        batch = stored.ndim - 2

        def one(numbers: jax.Array) -> jax.Array:
            size = math.prod(shape[batch:-1])
            columns = self.method.columns(numbers[0], size, dtype)
            return columns.reshape(shape[batch:])

        for _ in range(batch):
            one = jax.vmap(one)
        return one(stored)

    def expected(self, batch: int, shape: tuple[int, ...]) -> str:
        return describe_numbers((*shape[:batch], 1, shape[-1]))
