# SPDX-License-Identifier: Apache-2.0
"""What becomes of one leaf."""

import dataclasses
import math

from galore_optax._types import Scalar

_VECTORS = frozenset({"bias", "norm", "vector"})  # reasons; stacked ones have two axes


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """What becomes of one leaf; sizes in bytes."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    reason: str  # what the rule took the leaf for
    matrix: str  # "batch x (rows x cols)", empty where nothing is projected
    side: str  # "left" (rows), "right" (cols), "full", or empty
    rank: int  # 0 where nothing is projected
    smaller_side: int  # of the matrix, the highest rank there is; 0 likewise
    gap: Scalar
    scale: Scalar  # of its updates; at full size the rate that multiplies them
    state_bytes: int  # projector, refresh counters and all that the inner holds
    wider_bytes: int  # of these, what moments wider than a 16-bit leaf add
    adam_bytes: int  # of optax.adam for the same leaf
    adam_f32_bytes: int  # the same with f32 moments of a 16-bit leaf

    @property
    def exceeds_adam(self) -> bool:
        return self.state_bytes > self.adam_bytes

    @property
    def is_projected(self) -> bool:
        return self.rank > 0

    @property
    def rank_is_full(self) -> bool:
        """Whether the rank reaches a dimension, so that projecting saves nothing."""
        return self.is_projected and self.rank >= self.smaller_side

    @property
    def holds_matrices(self) -> bool:
        """Whether it has two or more axes and is no stack of vectors."""
        return len(self.shape) > 1 and self.reason not in _VECTORS

    @property
    def entries(self) -> int:
        return math.prod(self.shape)


def size(number: int) -> str:
    """Bytes in GB (10^9), MB or kB."""
    for unit, one in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= one:
            return f"{number / one:.2f} {unit}"
    return f"{number} B"
