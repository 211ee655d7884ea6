# SPDX-License-Identifier: Apache-2.0
"""In which order XLA computes what it could compute at any time."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

Tree = TypeVar("Tree")

# Of lifted updates that may be waiting to be applied, on CPU.
IN_FLIGHT_BYTES = 16 * 2**20


def after(tree: Tree, other: jax.Array) -> Tree:
    """`tree`, with arrays that XLA cannot compute on before it has `other`."""
    if jax.device_count() > 1:
        # An entry of `other` may lie on another device. A barrier sends nothing; it
        # keeps the two apart, and on GPU leaves it to the scheduler when they run.
        return lax.optimization_barrier((tree, other))[0]
    first = other[(0,) * other.ndim].astype(jnp.float32)
    # At most 32 leading zeros, which XLA does not know.
    zero = lax.clz(lax.bitcast_convert_type(first, jnp.uint32)) >> 6
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def in_turn(low: jax.Array, lifted: Sequence[jax.Array]) -> jax.Array:
    """`low`, which XLA's CPU backend cannot lift before most of `lifted` is there.

    It runs whatever is ready in order of readiness: every matrix would be lifted before
    the first is applied, into temporaries as large as the model, fresh pages each step
    (benchmarks/floor.py). Other backends schedule for memory.
    """
    waiting = 0
    for full in reversed(lifted):
        waiting += full.size * full.dtype.itemsize
        if waiting >= IN_FLIGHT_BYTES and jax.device_count() == 1:
            return lax.platform_dependent(
                low, full, cpu=jax.jit(_lift_after), default=_at_once
            )
    return low


def _lift_after(low: jax.Array, other: jax.Array) -> jax.Array:
    """As `after`, and to be found in a jaxpr by its name."""
    return after(low, other)


def _at_once(low: jax.Array, other: jax.Array) -> jax.Array:
    del other
    return low


def row_major(x: jax.Array) -> jax.Array:
    """`x` as it is, whose layout says nothing about that of what it is a part of.

    Or XLA lays out a whole stack as the use of one layer wants it, transposed, and
    copies it before and after a loop: 0.5 GB of a layerwise 7B step and half its
    compile time, 2.9 GB of one that keeps all gradients.
    """
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def only_waits(equation: Any) -> bool:
    """Whether the result is the first operand, and the second only says when."""
    return equation.params.get("name") == _lift_after.__name__
