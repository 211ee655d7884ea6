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
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp

from galore_optax.codes.affine import Affine, QuantizedProjector

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
class FewBits:
    """In a code of eight or four bits."""

    code: Affine

    def initial(self, shape: tuple[int, ...], dtype: jnp.dtype) -> QuantizedProjector:
        del dtype
        return _encode(self.code, jnp.eye(math.prod(shape[:-1]), shape[-1]))

    def encode(self, basis: jax.Array, old: Any) -> QuantizedProjector:
        del old
        return self.code.encode(basis)

    def decode(
        self, stored: Any, shape: tuple[int, ...], dtype: jnp.dtype
    ) -> jax.Array:
        return self.code.decode(stored, shape, dtype)

    def expected(self, batch: int, shape: tuple[int, ...]) -> str:
        length = math.prod(shape[batch:-1])
        shapes = self.code.shapes(shape[:batch], length, shape[-1])
        return _describe_quantized(self.code.dtype, *shapes)


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
    return FewBits(Affine(_BITS[dtype.name]))


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
