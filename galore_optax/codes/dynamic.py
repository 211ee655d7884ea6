# SPDX-License-Identifier: Apache-2.0
"""The blockwise dynamic code of bitsandbytes."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax.codes._base import Code, Quantized

_DECADES = 7


def table(signed: bool) -> np.ndarray:
    """The 256 values of the code, ascending, f32.

    Decade i of seven holds the midpoints of an even division of [0.1, 1], twice as many
    as the decade below, times 10^(i-6); then 0 and 1. The signed code has half as many
    of each sign, and no -1.
    """
    decades = []
    for i in range(_DECADES):
        edges = np.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - _DECADES + 1))
    positive = np.concatenate(decades)
    negative = -positive if signed else positive[:0]
    values = np.concatenate([negative, [0.0], positive, [1.0]])
    return np.sort(values).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _Dynamic:
    block: int
    min_size: int

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"dynamic(block={self.block}): must be at least 1.")

    def suits(self, shape: Sequence[int]) -> bool:
        return math.prod(shape) >= self.min_size

    def zeros(self, shape: Sequence[int], signed: bool) -> Quantized:
        zero = int(np.searchsorted(table(signed), 0))
        count = math.ceil(math.prod(shape) / self.block)
        codes = jnp.full(shape, zero, jnp.uint8)
        return Quantized(codes, jnp.zeros(count, jnp.float32))

    def encode(self, x: jax.Array, signed: bool) -> Quantized:
        x = jnp.where(jnp.isfinite(x), x, 0)
        blocks = self._blocks(x)
        scales = jnp.max(jnp.abs(blocks), axis=1)
        unit = blocks / jnp.where(scales > 0, scales, 1)[:, None]
        values = table(signed)
        middles = (values[:-1] + values[1:]) / 2
        codes = jnp.searchsorted(jnp.asarray(middles), unit, side="left")
        codes = codes.astype(jnp.uint8).reshape(-1)[: x.size].reshape(x.shape)
        return Quantized(codes, scales)

    def decode(self, coded: Quantized, signed: bool) -> jax.Array:
        # Through i32: uint8 indices would wrap in XLA's bounds checks.
        unit = jnp.asarray(table(signed))[coded.codes.astype(jnp.int32)]
        blocks = self._blocks(unit) * coded.scales[:, None]
        return blocks.reshape(-1)[: unit.size].reshape(unit.shape)

    def _blocks(self, x: jax.Array) -> jax.Array:
        """(blocks, block), the last filled up with zeros."""
        count = math.ceil(x.size / self.block)
        flat = jnp.pad(x.reshape(-1), (0, count * self.block - x.size))
        return flat.reshape(count, self.block)


def dynamic(*, block: int = 256, min_size: int = 4096) -> Code:
    """The code of bitsandbytes' 8-bit optimizers, entry for entry.

    .. math:: q = \\mathrm{argmin}_j |t_j - x / s|, \\qquad s = \\max |x|
        \\text{ over a block of the flattened array}

    For parity. Seven decades below each block's maximum, 0.4 to 0.8 per cent apart near
    it and ever coarser below. Blocks run across rows, so that the sharding of an array
    says nothing about that of its scales.

    Args:
      block: entries that share a scale.
      min_size: arrays with fewer entries are kept as they are.

    Returns:
      a code.

    Raises:
      ValueError: `block` is below 1.

    Example:
      >>> import galore_optax, optax
      >>> code = galore_optax.codes.dynamic()
      >>> tx = galore_optax.quantized(optax.adam(1e-3), code=code)

    Source: Dettmers et al., arXiv 2110.02861, section 2.
    """
    return _Dynamic(block, min_size)
