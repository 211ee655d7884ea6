# SPDX-License-Identifier: Apache-2.0
"""The code of projectors, written from its definition and not from ours."""

import math
from typing import Any

import numpy as np


def blocks_of(length: int, even: bool) -> tuple[int, int]:
    """How many blocks of at most 64 entries, and the entries of each."""
    count = math.ceil(length / 64)
    size = math.ceil(length / count)
    return count, size + size % 2 if even else size


def scales_of(basis: np.ndarray, bits: int) -> np.ndarray:
    """Of each entry the exact scale of its block, (hi - lo) / (2^bits - 1)."""
    _, size = blocks_of(len(basis), bits == 4)
    result = np.zeros(basis.shape)
    for start in range(0, len(basis), size):
        block = basis[start : start + size].astype(np.float64)
        low, high = np.minimum(block.min(0), 0), np.maximum(block.max(0), 0)
        result[start : start + size] = (high - low) / (2**bits - 1)
    return result


def expected_bytes(matrices: int, length: int, rank: int, bits: int) -> int:
    count, size = blocks_of(length, bits == 4)
    return matrices * rank * count * (size * bits // 8 + 2 + 1)


def decoded(node: Any, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """From the stored arrays, entry by entry."""
    codes, scales, zeros = (np.asarray(x) for x in node)
    *batch, count, rank = scales.shape
    codes = codes.reshape(*batch, count, -1, rank).astype(int)
    if bits == 4:
        codes = np.concatenate([codes % 16, codes // 16], axis=-2)
    steps = codes - zeros[..., None, :].astype(int)
    entries = (steps * scales[..., None, :].astype(np.float64)).reshape(
        *batch, -1, rank
    )
    length = math.prod(shape[len(batch) : -1])
    return entries[..., :length, :].reshape(shape)
