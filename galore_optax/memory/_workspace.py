# SPDX-License-Identifier: Apache-2.0
"""Bytes that an optimizer's update needs beside gradients and state."""

import math
from collections.abc import Sequence

from galore_optax._matrices import Matrix
from galore_optax._record import Recorded

_WIDE = 4  # bytes of f32, in which projection products accumulate


def lift_bytes(records: Sequence[Recorded], itemsize: int) -> int:
    """The worst of all projected leaves: its update in f32, less its gradient.

    .. math:: \\max_W\\; 4\\,(mn + rn) - s\\,mn

    per matrix of a stacked leaf, times their number: the lifted update (m, n) and the
    projected gradient (r, n) are there in f32 when the gradient is not needed any more.
    Zero for a transformation without `galore`, whose update XLA fuses into the weights.
    """
    leaves = [matrix for record in records for matrix in record.plan.projected]
    return max((_lift(matrix, itemsize) for matrix in leaves), default=0)


def _lift(matrix: Matrix, itemsize: int) -> int:
    full = math.prod(matrix.shape)
    return _WIDE * (full + math.prod(matrix.coordinate_shape)) - itemsize * full


def largest_stack(records: Sequence[Recorded]) -> int:
    """How many matrices the largest projected leaf stacks; 1 where there is none."""
    leaves = [matrix for record in records for matrix in record.plan.projected]
    return max(leaves, key=lambda leaf: math.prod(leaf.shape)).count if leaves else 1
