# SPDX-License-Identifier: Apache-2.0
"""How projectors are stored: in a floating dtype, or in eight or four bits an entry.

    encode      basis -> stored, once a refresh
    decode      stored -> basis, beside each product with it, one leaf at a time

A stored projector is an array or a pytree of arrays. Each has the batch axes of the
leaf first and the rank axis last, so that slicing, stacking and placing it need not
know which.
"""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol, TypeAlias

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


Projector: TypeAlias = jax.Array | QuantizedProjector
Projectors: TypeAlias = tuple[Projector, ...]  # one, or two for proj_type "full"


class Storage(Protocol):
    """One way to store projectors; shapes are (*batch axes, *projected axes, rank)."""

    def initial(self, shape: tuple[int, ...], dtype: jnp.dtype) -> Projector:
        """A slice of the identity, for one matrix of a leaf of `dtype`."""
        ...

    def encode(self, basis: jax.Array, old: Projector) -> Projector:
        """`basis`, (m, rank), stored as `old` is."""
        ...

    def decode(
        self, stored: Projector, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> jax.Array:
        """The projector, of `shape`; in `dtype` unless it has a floating one."""
        ...

    def expected(self, batch: int, shape: tuple[int, ...]) -> str:
        """What `describe_stored` says of a projector whose first axes are batch."""
        ...


@dataclasses.dataclass(frozen=True)
class Floating:
    """As it is, in one dtype."""

    dtype: jnp.dtype | None = None  # that of the parameter if None

    def initial(self, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        size = math.prod(shape[:-1])
        dtype = jax.dtypes.canonicalize_dtype(self.dtype or dtype)
        return jnp.eye(size, shape[-1], dtype=dtype).reshape(shape)

    def encode(self, basis: jax.Array, old: Any) -> jax.Array:
        return basis.astype(old.dtype)

    def decode(
        self, stored: Any, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> jax.Array:
        del shape, dtype
        return stored

    def expected(self, batch: int, shape: tuple[int, ...]) -> str:
        del batch
        return _describe_floating(shape)


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

    def initial(self, shape: tuple[int, ...], dtype: jnp.dtype) -> QuantizedProjector:
        del dtype
        return _encode(self, jnp.eye(math.prod(shape[:-1]), shape[-1]))

    def encode(self, basis: jax.Array, old: Any = None) -> QuantizedProjector:
        del old
        blocks = self._blocks(basis.astype(jnp.float32))
        low = jnp.minimum(jnp.min(blocks, 1, keepdims=True), 0)
        high = jnp.maximum(jnp.max(blocks, 1, keepdims=True), 0)
        scales = round_up((high - low) / self.levels)
        step = jnp.where(scales > 0, scales, 1).astype(jnp.float32)
        zeros = jnp.round(-low / step)
        codes = jnp.clip(jnp.round(blocks / step) + zeros, 0, self.levels)
        least = jnp.iinfo(self.dtype).min  # codes count from here; decoding subtracts
        codes, zeros = ((x + least).astype(self.dtype) for x in (codes, zeros))
        packed = self._pack(codes).reshape(-1, basis.shape[1])
        return QuantizedProjector(packed, scales[:, 0], zeros[:, 0])

    def decode(
        self, stored: Any, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> jax.Array:
        *batch, blocks, rank = stored.scales.shape
        length = math.prod(shape[len(batch) : -1])
        codes = self._unpack(stored.codes.reshape(*batch, blocks, -1, rank))
        steps = codes.astype(jnp.float32) - _over_blocks(stored.zeros)
        # Exact in f32: eight bits and a sign times the eight of a bf16.
        entries = (steps * _over_blocks(stored.scales)).reshape(*batch, -1, rank)
        return entries[..., :length, :].reshape(shape).astype(dtype)

    def expected(self, batch: int, shape: tuple[int, ...]) -> str:
        blocks, width = self.layout(math.prod(shape[batch:-1]))
        sizes = (*shape[:batch], blocks * width, shape[-1])
        scales = (*shape[:batch], blocks, shape[-1])
        return _describe_quantized(self.dtype, sizes, scales)

    def _blocks(self, basis: jax.Array) -> jax.Array:
        """(blocks, entries, rank), zeros after the last entry."""
        length, rank = basis.shape
        blocks, width = self.layout(length)
        size = blocks * width * self.per_byte
        filled = jnp.pad(basis, ((0, size - length), (0, 0)))
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


# One compilation a shape where `init` is not itself compiled.
_encode = jax.jit(Affine.encode, static_argnums=0)

_BITS = {"int8": 8, "int4": 4}


def storage_of(projector_dtype: Any) -> Storage:
    """The storage that the argument `projector_dtype` asks for."""
    if projector_dtype is None:
        return Floating(None)
    try:
        dtype = jnp.dtype(projector_dtype)
    except TypeError:
        dtype = None
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        return Floating(dtype)
    if dtype is None or dtype.name not in _BITS:
        raise TypeError(
            f"projector_dtype={projector_dtype!r} must be a floating-point dtype, or"
            " jnp.int8 or jnp.int4 for projectors in eight or four bits, or None for"
            " the dtype of the parameter."
        )
    return Affine(_BITS[dtype.name])


def describe_stored(stored: Any) -> str:
    """Layout and sizes of a projector, for errors and to compare."""
    if isinstance(stored, QuantizedProjector):
        codes, scales, _ = stored
        return _describe_quantized(codes.dtype, codes.shape, scales.shape)
    if hasattr(stored, "shape"):
        numbers = jnp.issubdtype(stored.dtype, jnp.unsignedinteger)
        return (describe_numbers if numbers else _describe_floating)(stored.shape)
    return f"type {type(stored).__name__}"


def describe_numbers(shape: tuple[int, ...]) -> str:
    return f"rank {shape[-1]} by a number a column, of shape {shape}"


def _describe_floating(shape: tuple[int, ...]) -> str:
    return f"rank {shape[-1]} and shape {shape}"


def _describe_quantized(
    dtype: jnp.dtype, codes: tuple[int, ...], scales: tuple[int, ...]
) -> str:
    bits = {"int8": "eight", "uint8": "four"}.get(dtype.name, "other")
    return f"rank {codes[-1]} in {bits} bits, codes {codes} and scales {scales}"
