# SPDX-License-Identifier: Apache-2.0
"""A companded code: arithmetic in place of a table."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax._xla.sharding import (
    explicit_sharding,
    fitting,
    made_of,
    names_of,
    place,
)
from galore_optax.codes._base import Code, Quantized
from galore_optax.codes._scales import round_up

_LARGEST_BLOCK = 64
_SMALLEST_BLOCK = 8  # below that the scales weigh more than a quarter of the codes


@dataclasses.dataclass(frozen=True)
class _Companded:
    block: int | None
    min_size: int

    def __post_init__(self) -> None:
        if self.block is not None and self.block < 1:
            raise ValueError(f"companded(block={self.block}): must be at least 1.")

    def suits(self, shape: Sequence[int]) -> bool:
        if not shape or math.prod(shape) < self.min_size:
            return False
        length = shape[_axis(shape)]
        if self.block is not None and length % self.block:
            raise ValueError(
                f"block={self.block} does not divide axis {_axis(shape)} of"
                f" {tuple(shape)}. Leave block out, and each array gets one that suits"
                f" it, here {_blocks(length, None)[1]}."
            )
        return True

    def zeros(self, shape: Sequence[int], signed: bool) -> Quantized:
        axis = _axis(shape)
        count, _ = _blocks(shape[axis], self.block)
        scales = (*shape[:axis], count, *shape[axis + 1 :])
        dtype = jnp.int8 if signed else jnp.uint8
        return Quantized(jnp.zeros(shape, dtype), jnp.zeros(scales, jnp.bfloat16))

    def encode(self, x: jax.Array, signed: bool) -> Quantized:
        x = jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32)
        blocks, axis = self._split(x)
        largest = jnp.max(jnp.abs(blocks), axis=axis + 1, keepdims=True)
        scales = round_up(largest)
        unit = blocks / jnp.where(scales > 0, scales.astype(jnp.float32), 1)
        root = jnp.sqrt(jnp.abs(unit) if signed else jnp.maximum(unit, 0))
        if signed:
            codes = jnp.round(127 * jnp.sign(unit) * root).astype(jnp.int8)
        else:
            levels = jnp.round(255 * jnp.sqrt(root))
            codes = jnp.maximum(levels, (root > 0).astype(levels.dtype)).astype(
                jnp.uint8
            )
        joined = place(_join(codes, axis, x.shape), explicit_sharding(x))
        return Quantized(joined, jnp.squeeze(scales, axis + 1))

    def decode(self, coded: Quantized, signed: bool) -> jax.Array:
        blocks, axis = self._split(coded.codes)
        z = blocks.astype(jnp.float32) / (127 if signed else 255)
        unit = z * jnp.abs(z) if signed else (z * z) ** 2
        scales = jnp.expand_dims(coded.scales, axis + 1).astype(jnp.float32)
        return _join(unit * scales, axis, coded.codes.shape)

    def _split(self, x: jax.Array) -> tuple[jax.Array, int]:
        """The array with its longest axis in two, blocks and their entries."""
        axis = _axis(x.shape)
        before, length, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
        parts = _blocks(length, self.block)
        x, sharding = _whole_blocks(x, axis, parts)
        missing = math.prod(parts) - length
        if missing:
            widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
            x = jnp.pad(x, widths)
        shape = (*before, *parts, *after)
        return jax.lax.reshape(x, shape, out_sharding=sharding), axis


def _whole_blocks(
    x: jax.Array, axis: int, parts: tuple[int, int]
) -> tuple[jax.Array, Any]:
    """`x` and the sharding that `_split` gives it, under Explicit axes.

    Shards that would cut blocks are gathered first; under Auto axes XLA does that.
    """
    sharding = explicit_sharding(x)
    if sharding is None:
        return x, None
    names = names_of(sharding, x.ndim)
    even = math.prod(parts) == x.shape[axis]
    names[axis] = fitting(sharding.mesh, names[axis], parts[0]) if even else ()
    blocks = [*names[: axis + 1], (), *names[axis + 1 :]]
    return place(x, made_of(sharding.mesh, names)), made_of(sharding.mesh, blocks)


def _join(blocks: jax.Array, axis: int, shape: Sequence[int]) -> jax.Array:
    """The inverse of `_split`: an array of `shape`."""
    sharding = explicit_sharding(blocks)
    if sharding is not None:
        names = names_of(sharding, blocks.ndim)
        sharding = made_of(sharding.mesh, [*names[: axis + 1], *names[axis + 2 :]])
    length = blocks.shape[axis] * blocks.shape[axis + 1]
    joined = (*shape[:axis], length, *shape[axis + 1 :])
    filled = jax.lax.reshape(blocks, joined, out_sharding=sharding)
    if length == shape[axis]:
        return filled
    return jax.lax.slice_in_dim(filled, 0, shape[axis], axis=axis)


def _axis(shape: Sequence[int]) -> int:
    """The longest, which is never a rank axis; the last of equal ones."""
    return max(range(len(shape)), key=lambda axis: (shape[axis], axis))


def _blocks(length: int, block: int | None) -> tuple[int, int]:
    """How many blocks an axis has, and the entries of each."""
    width = block or _largest_divisor(length)
    if block or width >= min(length, _SMALLEST_BLOCK):
        return length // width, width
    count = -(-length // _LARGEST_BLOCK)
    return count, -(-length // count)


def _largest_divisor(length: int) -> int:
    limit = min(length, _LARGEST_BLOCK)
    return next(n for n in range(limit, 0, -1) if length % n == 0)


def companded(*, block: int | None = None, min_size: int = 4096) -> Code:
    """Element-wise arithmetic, which XLA fuses into the optimizer's own.

    .. math:: q = \\mathrm{round}(127\\, \\mathrm{sign}(u) \\sqrt{|u|}) \\text{ or }
        \\mathrm{round}(255\\, u^{1/4}), \\qquad u = x / s

    for signed and unsigned arrays, `s` the largest entry of a block in bf16, and no
    `q = 0` for an unsigned `u > 0`: no first moment is divided by a second one that
    became zero. Finer near zero than a linear code. Blocks run along the longest axis,
    so that `scales` has the axes of the array and can be sharded like it.

    Args:
      block: entries that share a scale; by default the largest divisor, from 8 to 64,
        of the axis. Where it has none, as 32,003 entries have not, blocks have at most
        64 entries, and the last is the shorter.
      min_size: arrays with fewer entries are kept as they are.

    Returns:
      a code.

    Raises:
      ValueError: `block` is below 1 or, in `init`, does not divide an axis.

    Example:
      >>> import galore_optax, optax
      >>> code = galore_optax.codes.companded(block=32)
      >>> tx = galore_optax.quantized(optax.adam(1e-3), code=code)

    Source: FlashOptim, arXiv 2602.23349, compands in groups of 32, its second moments
    by a square root: in blocks of rare and frequent tokens those become zero.
    """
    return _Companded(block, min_size)
