# SPDX-License-Identifier: Apache-2.0
"""Entries of a stack, split over devices in other axes, dealt out whole: all-to-all.

Inside `shard_map`: what XLA makes of a constraint on a sharding may be gathers.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax._xla.sharding import Names


@dataclasses.dataclass(frozen=True)
class Deal:
    """How the entries of a stack, the first axis of local arrays, get their owners."""

    axes: Names  # of the mesh, over which they are dealt out
    sizes: tuple[int, ...]
    count: int  # entries of the stack

    @property
    def each(self) -> int:
        """Entries that a device owns, those included that fill up its hand."""
        return -(-self.count // math.prod(self.sizes))

    @property
    def one_each(self) -> "Deal":
        """Of as many entries as there are devices."""
        return dataclasses.replace(self, count=math.prod(self.sizes))

    def filled(self, stack: jax.Array, fill: int = 0) -> jax.Array:
        """With as many entries as all hands hold."""
        missing = math.prod(self.sizes) * self.each - self.count
        if not missing:
            return stack
        widths = [(0, missing)] + [(0, 0)] * (stack.ndim - 1)
        return jnp.pad(stack, widths, constant_values=fill)

    def nth(self, filled: jax.Array, number: jax.Array) -> jax.Array:
        """Of each device the entry with a number in its hand, to be dealt one each."""
        hands = filled.reshape(-1, self.each, *filled.shape[1:])
        return lax.dynamic_index_in_dim(hands, number, 1, keepdims=False)

    def deal(
        self, stack: jax.Array, names: Sequence[Names], fill: int = 0
    ) -> jax.Array:
        """(count, parts of the other axes) -> (each, all of the other axes)."""
        x, at = self._cut(stack, fill), len(self.axes)
        for name in self._unused(names):
            dim = self.axes.index(name)
            x = lax.dynamic_slice_in_dim(x, lax.axis_index(name), 1, dim)
        for axis, split in enumerate(names):
            for name in reversed(split):  # the last of them splits the finest
                x = _swap(x, name, self.axes.index(name), at + 1 + axis)
        return x.reshape(x.shape[at:])

    def collect(self, mine: jax.Array, names: Sequence[Names]) -> jax.Array:
        """The inverse of `deal`."""
        at = len(self.axes)
        x = mine.reshape((1,) * at + mine.shape)
        for axis, split in enumerate(names):
            for name in split:
                x = _swap(x, name, at + 1 + axis, self.axes.index(name))
        for name in self._unused(names):
            x = lax.all_gather(x, name, axis=self.axes.index(name), tiled=True)
        return x.reshape(-1, *x.shape[at + 1 :])[: self.count]

    def _cut(self, stack: jax.Array, fill: int) -> jax.Array:
        """The stack as (devices of each mesh axis, each, other axes)."""
        whole = self.filled(stack, fill)
        return whole.reshape(*self.sizes, self.each, *stack.shape[1:])

    def _unused(self, names: Sequence[Names]) -> list[str]:
        used = {name for split in names for name in split}
        return [name for name in self.axes if name not in used]


def _swap(x: jax.Array, name: str, split: int, joined: int) -> jax.Array:
    """Each device takes its part of one axis, and all parts of the other."""
    return lax.all_to_all(x, name, split, joined, tiled=True)
