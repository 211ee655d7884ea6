# SPDX-License-Identifier: Apache-2.0
"""Projectors in few bits, decoded beside each product and no earlier."""

import dataclasses
from typing import Any

import jax

from galore_optax._storage.projectors import Storage


@dataclasses.dataclass(frozen=True)
class Coding:
    """How a projector of `shape` is stored; its first axes count matrices."""

    storage: Storage
    shape: tuple[int, ...]  # batch axes, projected axes, rank
    batch: int  # how many batch axes

    def decode(self, stored: Any, dtype: Any) -> jax.Array:
        return self.storage.decode(stored, self.shape, dtype)

    def is_batch(self, axis: int) -> bool:
        """Whether all that is stored has this axis too."""
        return axis < self.batch

    def without(self, axis: int) -> "Coding":
        shape = self.shape[:axis] + self.shape[axis + 1 :]
        return Coding(self.storage, shape, self.batch - 1)
