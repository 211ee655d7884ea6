# SPDX-License-Identifier: Apache-2.0
"""Is a difference between two settings larger than what seeds make?

The seeds of two settings are pairs: same initialisation, same order of the data. With
differences d_1 ... d_n of the pairs, their mean and Student's interval for it,

    mean(d) ± t(0.975, n - 1) · std(d) / sqrt(n)

A difference whose interval holds zero is *within the spread of seeds*. Of twenty
settings that differ in nothing, one is expected outside of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean of paired differences and the interval around it."""

    mean: float
    low: float
    high: float

    @property
    def beyond_seeds(self) -> bool:
        return not self.low <= 0 <= self.high

    def record(self) -> dict[str, Any]:
        """What JSON keeps of it."""
        return dataclasses.asdict(self) | {"beyond_seeds": self.beyond_seeds}


def difference(losses: Sequence[float], base: Sequence[float]) -> Difference:
    """`losses` less `base`, seed by seed.

    Raises:
      ValueError: not the same seeds in both, or fewer than two.
    """
    if len(losses) != len(base) or len(base) < 2:
        raise ValueError(
            f"{len(losses)} and {len(base)} losses: a spread takes the same two seeds"
            " or more in both."
        )
    pairs = np.asarray(losses, np.float64) - np.asarray(base, np.float64)
    count = len(pairs)
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)
    half = float(quantile * np.std(pairs, ddof=1) / np.sqrt(count))
    mean = float(np.mean(pairs))
    return Difference(mean, mean - half, mean + half)
