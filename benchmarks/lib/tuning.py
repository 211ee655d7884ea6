# SPDX-License-Identifier: Apache-2.0
"""Learning rates on a grid that grows at its edges.

A grid is the losses by exponent k, of rates base · 2^k, or by place on a ladder of
rates; a run that diverged has `None`.
"""

import math
from collections.abc import Mapping, Sequence

Losses = Mapping[int, float | None]


def rate(exponent: int) -> float:
    return 0.01 * 2.0**exponent


def wanted(losses: Losses, start: Sequence[int]) -> list[int]:
    """Exponents still to run: the grid's first ones, then those beside the best.

    Nothing is wanted once the best has a neighbour on either side.
    """
    missing = [k for k in start if k not in losses]
    if missing:
        return missing
    best = argbest(losses)
    return [k for k in (best - 1, best + 1) if k not in losses]


def argbest(losses: Losses) -> int:
    """The exponent of the smallest loss; of equal ones the smallest rate."""
    return min(losses, key=lambda k: (_or_infinite(losses[k]), k))


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None or not math.isfinite(loss) else loss
