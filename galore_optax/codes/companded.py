# SPDX-License-Identifier: Apache-2.0
"""A companded code: arithmetic in place of a table."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from galore_optax._xla.sharding import explicit_sharding, place
from galore_optax.codes._base import Code, Quantized
from galore_optax.codes._blocks import Blocks, blocks_of, over_entries, split
from galore_optax.codes._scales import bfloat16, upper_bits


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
                f" it, here {blocks_of(length).width}."
            )
        return True

    def zeros(self, shape: Sequence[int], signed: bool) -> Quantized:
        axis, blocks = self._blocks(shape)
        scales = (*shape[:axis], blocks.count, *shape[axis + 1 :])
        dtype = jnp.int8 if signed else jnp.uint8
        return Quantized(jnp.zeros(shape, dtype), jnp.zeros(scales, jnp.bfloat16))

    def encode(self, x: jax.Array, signed: bool) -> Quantized:
        x = jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32)
        axis, blocks = self._blocks(x.shape)
        # Split into blocks are two bytes an entry here and below, and not four: where
        # blocks do not fall on a TPU's tiles, what is split is laid out anew.
        scales = jnp.max(split(upper_bits(jnp.abs(x)), axis, blocks), axis=axis + 1)
        spread = bfloat16(over_entries(scales, axis, blocks)).astype(jnp.float32)
        unit = x / jnp.where(spread > 0, spread, 1)
        root = jnp.sqrt(jnp.abs(unit) if signed else jnp.maximum(unit, 0))
        if signed:
            codes = jnp.round(127 * jnp.sign(unit) * root).astype(jnp.int8)
        else:
            levels = jnp.round(255 * jnp.sqrt(root))
            codes = jnp.maximum(levels, (root > 0).astype(levels.dtype))
            codes = codes.astype(jnp.uint8)
        return Quantized(place(codes, explicit_sharding(x)), bfloat16(scales))

    def decode(self, coded: Quantized, signed: bool) -> jax.Array:
        axis, blocks = self._blocks(coded.codes.shape)
        bits = jax.lax.bitcast_convert_type(coded.scales, jnp.uint16)
        spread = bfloat16(over_entries(bits, axis, blocks)).astype(jnp.float32)
        z = coded.codes.astype(jnp.float32) / (127 if signed else 255)
        return (z * jnp.abs(z) if signed else (z * z) ** 2) * spread

    def _blocks(self, shape: Sequence[int]) -> tuple[int, Blocks]:
        """The axis that is cut, and how."""
        axis = _axis(shape)
        return axis, blocks_of(shape[axis], self.block)


def _axis(shape: Sequence[int]) -> int:
    """The longest, which is never a rank axis; the last of equal ones."""
    return max(range(len(shape)), key=lambda axis: (shape[axis], axis))


def companded(*, block: int | None = None, min_size: int = 4096) -> Code:
    """Element-wise arithmetic, which XLA fuses into the optimizer's own.

    .. math:: q = \\mathrm{round}(127\\, \\mathrm{sign}(u) \\sqrt{|u|}) \\text{ or }
        \\mathrm{round}(255\\, u^{1/4}), \\qquad u = x / s

    for signed and unsigned arrays, `s` the largest entry of a block in bf16, and no
    `q = 0` for an unsigned `u > 0`: no first moment is divided by a second one that
    became zero. Finer near zero than a linear code. Blocks run along the longest axis,
    so that `scales` has the axes of the array and can be sharded like it.

    Args:
      block: entries that share a scale; by default 16 to 64, such that as many devices
        as are a power of two, up to 128, each have whole blocks if each has 64 entries:
        64 of 4,096, 43 of 11,008, 50 of 32,000. Where nothing from 16 to 64 divides
        what a device has, as with 32,003 entries, the last block of it is shorter.
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
