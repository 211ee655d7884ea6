# SPDX-License-Identifier: Apache-2.0
"""Learning rates on a grid that grows at its edges, and when seeds tell two apart.

A grid is the losses by exponent k, of rates base · 2^k; a run that diverged has `None`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scipy import stats

Losses = Mapping[int, float | None]
CONFIDENCE = 0.95


def wanted(losses: Losses, start: Sequence[int]) -> list[int]:
    """Exponents still to run: the grid's first ones, then beyond an edge that is best.

    Nothing is wanted once the best has a neighbour on either side.
    """
    missing = [k for k in start if k not in losses]
    if missing:
        return missing
    best = argbest(losses)
    if best == min(losses):
        return [best - 1]
    return [best + 1] if best == max(losses) else []


def argbest(losses: Losses) -> int:
    """The exponent of the smallest loss; of equal ones the smallest rate."""
    return min(losses, key=lambda k: (_or_infinite(losses[k]), k))


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None or not math.isfinite(loss) else loss


class Difference(NamedTuple):
    """Mean of `two` less mean of `one`, and Welch's 95 % interval of it."""

    mean: float
    low: float
    high: float

    @property
    def separates(self) -> bool:
        return self.low > 0 or self.high < 0


def difference(one: Sequence[float], two: Sequence[float]) -> Difference | None:
    """What seeds say of two methods; nothing where one has fewer than two.

    Args:
      one: losses, one a seed.
      two: likewise; the number of seeds may differ.

    Source:
      Welch 1947; degrees of freedom by Welch and Satterthwaite.
    """
    if min(len(one), len(two)) < 2:
        return None
    found = stats.ttest_ind(two, one, equal_var=False)
    low, high = found.confidence_interval(CONFIDENCE)
    mean = sum(two) / len(two) - sum(one) / len(one)
    return Difference(mean, float(low), float(high))
