# SPDX-License-Identifier: Apache-2.0
"""An affine code in eight or four bits, for projectors.

Its error is a share of the range of a block, so that what is small beside its
neighbours becomes zero: harmless in a basis, and no code for second moments, by whose
roots first ones are divided.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from galore_optax.codes._scales import round_up


class QuantizedProjector(NamedTuple):
    r"""A projector in eight or four bits: arrays alone, which any checkpointer saves.

    .. math:: P_{ij} = \mathrm{scale} \cdot (\mathrm{code}_{ij} - \mathrm{zero})

    Scale and zero belong to a block of at most 64 entries of a column, the projected
    axes taken as one. No entry is off by more than half a scale. A basis is orthonormal
    before it is stored; of the bases of a small LLaMA, :math:`P^T P - I` then had a
    norm of at most 0.008 with eight bits and 0.15 with four, and `P` was off by 0.005
    and 0.09 of its own norm.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> tx = galore_optax.galore(optax.adam(1e-3), rank=4, projector_dtype=jnp.int4)
      >>> stored = tx.init({"kernel": jnp.ones((128, 256))}).projector["kernel"]
      >>> stored.codes.shape, stored.scales.shape, sum(x.nbytes for x in stored)
      ((64, 4), (2, 4), 280)

    Source: Q-GaLore, arXiv 2407.08296, section 3.3; here with a range that holds zero.
    """

    # (*batch axes, entries, rank), int8, or uint8 with two codes of four bits a byte.
    codes: jax.Array
    scales: jax.Array  # (*batch axes, blocks, rank), bf16
    zeros: jax.Array  # likewise, of the dtype of codes: the code of 0


@dataclasses.dataclass(frozen=True)
class Affine:
    r"""Integers between the least and the largest entry of a block, zero included.

    With :math:`a = \min(x, 0)` and :math:`b = \max(x, 0)` over a block,

    .. math:: s \ge (b - a) / L, \quad z = \mathrm{round}(-a / s), \quad
        q = \mathrm{round}(x / s) + z, \quad L = 2^{bits} - 1.

    Nothing is off by more than s/2. Rounding is odd, so x >= a gives q >= 0; and
    :math:`b / s - a / s \le L` gives q <= L, but where both halves are ties: q is L + 1
    then, and L is s/2 off. Zero is z exactly. A range without zero would need a z
    outside the codes for a block of one sign, and clipping it loses the block.

    The blocks of a column have one length, with zeros after the last entry: the range
    holds zero, so they change no code, and any length will do, primes too.
    """

    bits: int
    # At most so many entries a block. Scales and zeros then take 3 bytes for 64; blocks
    # of 256 would save 6 per cent of four-bit projectors, for an error larger by 22 on
    # real bases (`training/storage_bits`). A scale in f32 instead of bf16 would
    # take 0.3 per cent off the error, and add 6 to the bytes.
    block: int = 64

    @property
    def levels(self) -> int:
        return 2**self.bits - 1

    @property
    def per_byte(self) -> int:
        return 8 // self.bits

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(jnp.int8 if self.per_byte == 1 else jnp.uint8)

    def layout(self, length: int) -> tuple[int, int]:
        """Blocks of a column and the bytes of each."""
        blocks = -(-length // self.block)
        return blocks, -(-length // (blocks * self.per_byte))

    def encode(self, columns: jax.Array) -> QuantizedProjector:
        """Of (m, rank)."""
        blocks = self._blocks(columns.astype(jnp.float32))
        low = jnp.minimum(jnp.min(blocks, 1, keepdims=True), 0)
        high = jnp.maximum(jnp.max(blocks, 1, keepdims=True), 0)
        scales = round_up((high - low) / self.levels)
        step = jnp.where(scales > 0, scales, 1).astype(jnp.float32)
        zeros = jnp.round(-low / step)
        codes = jnp.clip(jnp.round(blocks / step) + zeros, 0, self.levels)
        least = jnp.iinfo(self.dtype).min  # codes count from here; decoding subtracts
        codes, zeros = ((x + least).astype(self.dtype) for x in (codes, zeros))
        packed = self._pack(codes).reshape(-1, columns.shape[1])
        return QuantizedProjector(packed, scales[:, 0], zeros[:, 0])

    def decode(
        self, stored: Any, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> jax.Array:
        """(*batch axes, *projected axes, rank), which codes alone do not tell."""
        *batch, blocks, rank = stored.scales.shape
        length = math.prod(shape[len(batch) : -1])
        codes = self._unpack(stored.codes.reshape(*batch, blocks, -1, rank))
        steps = codes.astype(jnp.float32) - _over_blocks(stored.zeros)
        # Exact in f32: eight bits and a sign times the eight of a bf16.
        entries = (steps * _over_blocks(stored.scales)).reshape(*batch, -1, rank)
        return entries[..., :length, :].reshape(shape).astype(dtype)

    def shapes(
        self, batch: tuple[int, ...], length: int, rank: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of codes and of scales."""
        blocks, width = self.layout(length)
        return (*batch, blocks * width, rank), (*batch, blocks, rank)

    def _blocks(self, columns: jax.Array) -> jax.Array:
        """(blocks, entries, rank), zeros after the last entry."""
        length, rank = columns.shape
        blocks, width = self.layout(length)
        size = blocks * width * self.per_byte
        filled = jnp.pad(columns, ((0, size - length), (0, 0)))
        return filled.reshape(blocks, -1, rank)

    def _pack(self, codes: jax.Array) -> jax.Array:
        """The second half of each block above the first, as its upper four bits."""
        if self.per_byte == 1:
            return codes
        first, second = jnp.split(codes, 2, axis=1)
        return first | (second << 4)

    def _unpack(self, codes: jax.Array) -> jax.Array:
        if self.per_byte == 1:
            return codes
        return jnp.concatenate([codes & 15, codes >> 4], axis=-2)


def _over_blocks(one_each: jax.Array) -> jax.Array:
    return jnp.expand_dims(one_each, -2).astype(jnp.float32)
