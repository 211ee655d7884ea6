# SPDX-License-Identifier: Apache-2.0
"""What is known of an optimizer from shapes, and what its update needs beside state."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from galore_optax._asking.record import Recorded
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


def coordinate_bytes(records: Sequence[Recorded]) -> int:
    """Bytes of the largest projected leaf's coordinates in f32.

    .. math:: \\max_W\\; 4\\,rn

    per matrix of a stacked leaf, times their number: beside the gradients that are not
    projected yet. What is lifted replaces the gradient it is made of, or is fused into
    the weights. Zero for a transformation without `galore`.
    """
    leaves = [matrix for record in records for matrix in record.plan.projected]
    sizes = (_WIDE * math.prod(matrix.coordinate_shape) for matrix in leaves)
    return max(sizes, default=0)


def largest_stack(records: Sequence[Recorded]) -> int:
    """How many matrices the largest projected leaf stacks; 1 where there is none."""
    leaves = [matrix for record in records for matrix in record.plan.projected]
    return max(leaves, key=lambda leaf: math.prod(leaf.shape)).count if leaves else 1
