# SPDX-License-Identifier: Apache-2.0
"""What is known of an optimizer from shapes, and what its update needs beside state."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from galore_optax._matrices import Matrix
from galore_optax._record import Recorded
from galore_optax.memory._bytes import StateBytes

_WIDE = 4  # bytes of f32, in which projection products accumulate


@dataclasses.dataclass(frozen=True)
class Measured:
    """What does not depend on how a step is run: shapes of parameters and state."""

    params: Any
    records: tuple[Recorded, ...]
    state: StateBytes
    adamw: int  # bytes of optax.adamw's state, its moments in the dtypes of the weights
    adamw_f32: int  # the same with f32 moments of 16-bit weights


def coordinates(measured: Measured) -> int:
    """f32 bytes of all gradients after projection; those not projected at full size."""
    leaves = [matrix for record in measured.records for matrix in record.plan.projected]
    entries = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(measured.params))
    saved = sum(
        math.prod(leaf.shape) - math.prod(leaf.coordinate_shape) for leaf in leaves
    )
    return _WIDE * (entries - saved)


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
