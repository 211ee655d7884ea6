# SPDX-License-Identifier: Apache-2.0
"""How many directions a matrix has, and how much two subspaces share.

Of singular values s_1 >= s_2 >= ..., always along the last axis:

    numerical rank   how many exceed one per cent of s_1
    stable rank      sum s_i^2 / s_1^2
    effective rank   exp(-sum p_i ln p_i), p_i = s_i / sum s_j

The last is that of Roy and Vetterli, The effective rank, EUSIPCO 2007: the number of
equal singular values that would have the same entropy.
"""

from collections.abc import Callable

import numpy as np

THRESHOLD = 0.01  # of the largest singular value


def singular_values(matrices: np.ndarray) -> np.ndarray:
    """Of matrices (..., m, n), descending, f64 (..., min(m, n))."""
    return np.linalg.svd(np.asarray(matrices, np.float64), compute_uv=False)


def normalised(values: np.ndarray) -> np.ndarray:
    """`values` divided by the largest; zeros where that is zero."""
    largest = values[..., :1]
    return values / np.where(largest > 0, largest, 1)


def numerical_rank(values: np.ndarray) -> np.ndarray:
    return np.sum(normalised(values) > THRESHOLD, axis=-1)


def stable_rank(values: np.ndarray) -> np.ndarray:
    return np.sum(normalised(values) ** 2, axis=-1)


def effective_rank(values: np.ndarray) -> np.ndarray:
    total = np.sum(values, axis=-1, keepdims=True)
    shares = values / np.where(total > 0, total, 1)
    logarithms = np.log(np.where(shares > 0, shares, 1))
    found = np.exp(-np.sum(shares * logarithms, axis=-1))
    return np.where(total[..., 0] > 0, found, 0.0)


RANKS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "numerical rank": numerical_rank,
    "effective rank": effective_rank,
    "stable rank": stable_rank,
}


def overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The share of a subspace that lies in another, of the same rank.

    With orthonormal bases P and Q, (..., m, r), the mean squared cosine of the
    principal angles,

        |PᵀQ|² / r  (Frobenius)

    1 for one span, whatever its basis; r / m in expectation for a span and a uniformly
    random one.
    """
    products = np.swapaxes(one, -1, -2).astype(np.float64) @ other.astype(np.float64)
    return np.sum(products**2, axis=(-1, -2)) / one.shape[-1]
