# SPDX-License-Identifier: Apache-2.0
"""The protocol of a code, and what a coded array is."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax


class Quantized(NamedTuple):
    """A coded array: a pytree of two arrays, which any checkpointer saves."""

    codes: jax.Array  # of the array's shape, 8-bit
    scales: jax.Array  # one a block


@runtime_checkable
class Code(Protocol):
    """A way to store an array in eight bits an entry.

    Implementations must be hashable and must not be callable
    (`optax.inject_hyperparams` would call them); a frozen dataclass does both.
    """

    def suits(self, shape: Sequence[int]) -> bool:
        """Whether an array of this shape is coded, or better kept as it is.

        Raises:
          ValueError: it should be coded, but cannot be, and why.
        """
        ...

    def zeros(self, shape: Sequence[int], signed: bool) -> Quantized:
        """Zeros of a shape that suits, coded: what `encode` makes of them.

        Filled in and not computed, for XLA would compute it while compiling. Its shapes
        and dtypes are those of every coded array of this shape.
        """
        ...

    def encode(self, x: jax.Array, signed: bool) -> Quantized:
        """Codes an f32 array; entries that are not finite count as zero.

        Args:
          x: any shape that suits.
          signed: whether entries may be negative.
        """
        ...

    def __hash__(self) -> int: ...

    def decode(self, coded: Quantized, signed: bool) -> jax.Array:
        """The array, in f32."""
        ...
