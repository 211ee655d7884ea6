# SPDX-License-Identifier: Apache-2.0
"""How an axis is cut into blocks that share a scale, on one device and on many.

    axis        shards, as many as a power of two allows
    shard       blocks of one width, the last of them filled up where none divides

From the length alone: a checkpoint moves to another mesh, and a mesh of which every
device has whole shards has whole blocks on every device.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from galore_optax._xla.sharding import (
    Names,
    explicit_sharding,
    fitting,
    made_of,
    names_of,
    place,
)

_LARGEST = 64
_SMALLEST = 16  # below that the scales weigh more than an eighth of the codes
_SHARD = 64  # entries at least
_SHARDS = 128  # where more of them would make blocks smaller


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Of an axis, all of one width."""

    length: int  # of the axis
    shards: int  # equal parts of it, of whole blocks each
    count: int
    width: int

    @property
    def missing(self) -> int:
        """Entries after the last one of a shard."""
        return (self.count * self.width - self.length) // self.shards


def blocks_of(length: int, width: int | None = None) -> Blocks:
    """The blocks of an axis, of `width` entries where that is said."""
    if width is not None:
        return _even(length, width)
    shards = _shards(length)
    width = _largest_divisor(length // min(shards, _SHARDS))
    if width >= min(length, _SMALLEST):
        return _even(length, width)
    in_shard = -(-length // (shards * _LARGEST))
    width = -(-length // (shards * in_shard))
    return Blocks(length, shards, shards * in_shard, width)


def _even(length: int, width: int) -> Blocks:
    return Blocks(length, length // width, length // width, width)


def _shards(length: int) -> int:
    """The most that are a power of two and have as many entries as a block should."""
    shards = 1
    while length % (2 * shards) == 0 and length // (2 * shards) >= _SHARD:
        shards *= 2
    return shards


def _largest_divisor(length: int) -> int:
    limit = min(length, _LARGEST)
    return next(n for n in range(limit, 0, -1) if length % n == 0)


def split(x: jax.Array, axis: int, blocks: Blocks) -> jax.Array:
    """`x`, its axis in two: blocks and their entries, zeros after the last."""
    x, names = _on_shards(x, axis, blocks)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    if blocks.missing:
        size = blocks.length // blocks.shards
        x = _reshape(x, (*before, blocks.shards, size, *after), names)
        widths = [(0, blocks.missing if i == axis + 1 else 0) for i in range(x.ndim)]
        x = jnp.pad(x, widths)
    return _reshape(x, (*before, blocks.count, blocks.width, *after), names)


def join(x: jax.Array, axis: int, blocks: Blocks) -> jax.Array:
    """The inverse of `split`."""
    names = _names(x)
    before, after = x.shape[:axis], x.shape[axis + 2 :]
    size = blocks.length // blocks.shards
    if blocks.missing:
        filled = (*before, blocks.shards, size + blocks.missing, *after)
        x = _reshape(x, filled, names)
        x = jax.lax.slice_in_dim(x, 0, size, axis=axis + 1)
    joined = None if names is None else [*names[: axis + 1], *names[axis + 2 :]]
    return _reshape(x, (*before, blocks.length, *after), joined)


def over_entries(scales: jax.Array, axis: int, blocks: Blocks) -> jax.Array:
    """One a block, as one an entry of the axis."""
    wide = jnp.expand_dims(scales, axis + 1)
    shape = [*scales.shape[: axis + 1], blocks.width, *scales.shape[axis + 1 :]]
    return join(jnp.broadcast_to(wide, shape), axis, blocks)


def _on_shards(
    x: jax.Array, axis: int, blocks: Blocks
) -> tuple[jax.Array, list[Names] | None]:
    """`x` with whole shards on every device, and the mesh axes of `split(x)`.

    Under Explicit axes; under Auto ones XLA settles it.
    """
    sharding = explicit_sharding(x)
    if sharding is None:
        return x, None
    names = names_of(sharding, x.ndim)
    names[axis] = fitting(sharding.mesh, names[axis], blocks.shards)
    x = place(x, made_of(sharding.mesh, names))
    return x, [*names[: axis + 1], (), *names[axis + 1 :]]


def _names(x: jax.Array) -> list[Names] | None:
    sharding = explicit_sharding(x)
    return None if sharding is None else names_of(sharding, x.ndim)


def _reshape(
    x: jax.Array, shape: Sequence[int], names: list[Names] | None
) -> jax.Array:
    """The mesh axes are those of the result."""
    mesh = jax.typeof(x).sharding.mesh
    sharding = None if names is None else made_of(mesh, names)
    return jax.lax.reshape(x, shape, out_sharding=sharding)
