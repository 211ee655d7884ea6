# SPDX-License-Identifier: Apache-2.0
"""What XLA is made to do that it would not do by itself, and all of it is here.

Each of these stands for a measurement, on the versions of JAX that it names; where XLA
has learned better, it can go.
"""

import bisect
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from galore_optax._xla.sharding import on_mesh

Tree = TypeVar("Tree")

# Of lifted updates that may be waiting to be applied, on CPU.
IN_FLIGHT_BYTES = 16 * 2**20


def after(tree: Tree, other: jax.Array) -> Tree:
    """`tree`, with arrays that XLA cannot compute on before it has `other`."""
    if on_mesh(other):
        # An entry of `other` may lie on another device. A barrier sends nothing; it
        # keeps the two apart, and on GPU leaves it to the scheduler when they run.
        return lax.optimization_barrier((tree, other))[0]
    first = other[(0,) * other.ndim].astype(jnp.float32)
    # At most 32 leading zeros, which XLA does not know.
    zero = lax.clz(lax.bitcast_convert_type(first, jnp.uint32)) >> 6
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


class InTurn:
    """Makes XLA's CPU backend lift a matrix after most of those before it.

    It runs whatever is ready in order of readiness: every matrix would be lifted before
    the first is applied, into temporaries as large as the model, fresh pages each step
    (`speed/floor`, JAX 0.10). Other backends schedule for memory.
    """

    def __init__(self) -> None:
        self._lifted: list[jax.Array] = []
        self._before: list[int] = []  # bytes lifted before each
        self._bytes = 0

    def wait(self, low: jax.Array) -> jax.Array:
        """`low`, not to be had before all but the last `IN_FLIGHT_BYTES` are lifted."""
        position = bisect.bisect_right(self._before, self._bytes - IN_FLIGHT_BYTES)
        if not position or on_mesh(self._lifted[position - 1]):
            return low
        return _on_cpu_after(low, self._lifted[position - 1])

    def lifted(self, full: jax.Array) -> None:
        self._lifted.append(full)
        self._before.append(self._bytes)
        self._bytes += full.size * full.dtype.itemsize


# Traced once for all leaves of one shape.
@functools.partial(jax.jit, inline=True)
def _on_cpu_after(low: jax.Array, other: jax.Array) -> jax.Array:
    return lax.platform_dependent(
        low, other, cpu=jax.jit(_lift_after), default=_at_once
    )


def one_by_one(tree: Tree, previous: jax.Array) -> tuple[Tree, jax.Array]:
    """Both as they are, on a mesh neither to be had before the other.

    For what is gathered from all devices for one product, after that of `previous`: XLA
    for TPU would gather all that it can as soon as it can, several at a time (libtpu
    0.0.42).
    """
    if not on_mesh(previous):
        return tree, previous
    return lax.optimization_barrier((tree, previous))


def once_done(tree: Tree, previous: Any) -> Tree:
    """`tree`, with which nothing begins before `previous` is there.

    Inside `shard_map`, where an array is on one device and a barrier sends nothing.
    """
    return lax.optimization_barrier((tree, previous))[0]


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


def rank_first(basis: jax.Array, axis: int) -> jax.Array:
    """`basis`, (batch axes, projected axes, rank), in memory with rank before `axis`.

    XLA's CPU backend computes `PᵀG` at half the speed of a product whose left operand
    is not transposed, and would undo a transposition that it can see
    (`speed/floor`, JAX 0.10).
    """

    def transposed(basis: jax.Array) -> jax.Array:
        rows = lax.optimization_barrier(jnp.moveaxis(basis, -1, axis))
        return jnp.moveaxis(rows, axis, -1)

    return lax.platform_dependent(basis, cpu=transposed, default=lambda basis: basis)


def unknown(numbers: Sequence[int], step: jax.Array) -> tuple[jax.Array, ...]:
    """`numbers`, which the compiler cannot tell from others.

    A slice with a known start is a kernel of its own, and XLA's CPU compiler spends
    6 ms on each; with unknown ones all leaves share one (JAX 0.10).
    """
    known = tuple(map(np.int32, numbers))
    return lax.cond(step >= 0, lambda: known, lambda: (np.int32(0),) * len(known))


def only_waits(equation: Any) -> bool:
    """Whether the result is the first operand, and the second only says when."""
    return equation.params.get("name") == _lift_after.__name__
