# SPDX-License-Identifier: Apache-2.0
"""A companded code: arithmetic in place of a table."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

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
        if self.block is None:
            return _largest_divisor(length) >= _SMALLEST_BLOCK
        if length % self.block:
            raise ValueError(
                f"block={self.block} does not divide axis {_axis(shape)} of"
                f" {tuple(shape)}. Leave block out, and each array gets the largest"
                f" that does, here {_largest_divisor(length)}."
            )
        return True

    def encode(self, x: jax.Array, signed: bool) -> Quantized:
        x = jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32)
        blocks, axis = self._blocks(x)
        largest = jnp.max(jnp.abs(blocks), axis=axis + 1, keepdims=True)
        scales = round_up(largest)
        unit = blocks / jnp.where(scales > 0, scales.astype(jnp.float32), 1)
        root = jnp.sqrt(jnp.abs(unit) if signed else jnp.maximum(unit, 0))
        if signed:
            codes = jnp.round(127 * jnp.sign(unit) * root).astype(jnp.int8)
        else:
            levels = jnp.round(255 * jnp.sqrt(root))
            codes = jnp.maximum(levels, root > 0).astype(jnp.uint8)
        return Quantized(codes.reshape(x.shape), jnp.squeeze(scales, axis + 1))

    def decode(self, coded: Quantized, signed: bool) -> jax.Array:
        blocks, axis = self._blocks(coded.codes)
        z = blocks.astype(jnp.float32) / (127 if signed else 255)
        unit = z * jnp.abs(z) if signed else (z * z) ** 2
        scales = jnp.expand_dims(coded.scales, axis + 1).astype(jnp.float32)
        return (unit * scales).reshape(coded.codes.shape)

    def _blocks(self, x: jax.Array) -> tuple[jax.Array, int]:
        """The array with its longest axis in two, blocks and their entries."""
        axis = _axis(x.shape)
        block = self.block or _largest_divisor(x.shape[axis])
        parts = (x.shape[axis] // block, block)
        return x.reshape(*x.shape[:axis], *parts, *x.shape[axis + 1 :]), axis


def _axis(shape: Sequence[int]) -> int:
    """The longest, which is never a rank axis; the last of equal ones."""
    return max(range(len(shape)), key=lambda axis: (shape[axis], axis))


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
      block: entries that share a scale; by default the largest divisor, up to 64, of
        the axis.
      min_size: arrays with fewer entries are kept as they are, and, where `block` is
        left out, those whose longest axis has no divisor from 8 to 64.

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
