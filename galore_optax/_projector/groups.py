# SPDX-License-Identifier: Apache-2.0
"""The matrices that a refresh renews in one loop, from whichever leaves.

leaves      projectors and gradients, each a batch of matrices
groups      leaves whose matrices are of one kind, joined
views       the gradients of some matrices of a group, for each side
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from galore_optax._selection.matrices import Matrix, Side
from galore_optax._storage.projectors import Projectors
from galore_optax._xla.order import Tree, row_major, unknown
from galore_optax._xla.sharding import explicit_sharding, place, replicated

_BRANCHES = 16  # of one switch
_ALONE = 8  # matrices of a leaf that is a group of its own
_AT_ONCE = 16  # matrices in one turn, where that is worth it, and
_AT_ONCE_BYTES = 2**30  # of their gradients


class Cut(NamedTuple):
    """Where one matrix lies in a gradient: of leaves that are built alike, the same."""

    batch: tuple[int, ...]
    batch_shape: tuple[int, ...]
    sides: tuple[Side, ...]

    def views(self, gradient: jax.Array, number: jax.Array) -> list[jax.Array]:
        """The gradient of one matrix, for each side (projected side, other side)."""
        shape = gradient.shape
        if self.batch:
            index = jnp.unravel_index(number, self.batch_shape)
            for axis, place_on_axis in zip(self.batch, index, strict=True):
                gradient = lax.dynamic_slice_in_dim(gradient, place_on_axis, 1, axis)
            gradient = row_major(gradient)
        return [
            gradient.transpose(*self.batch, *side.axes, *side.others).reshape(
                math.prod(shape[axis] for axis in side.axes), -1
            )
            for side in self.sides
        ]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The matrices of one leaf."""

    matrix: Matrix
    start: int  # of its matrices among those at hand
    gradient: jax.Array
    projectors: Projectors
    # The same, every array of them as (matrices, entries, rank).
    stacks: Projectors

    @property
    def kind(self) -> tuple[Any, ...]:
        return kind_of(self.matrix, self.gradient, self.projectors)

    @property
    def entries(self) -> np.ndarray:
        return self.start + np.arange(self.matrix.count)

    @property
    def cut(self) -> "Cut":
        return Cut(self.matrix.batch, self.matrix.batch_shape, self.matrix.sides)


def kind_of(
    matrix: Matrix, gradient: jax.Array, projectors: Projectors
) -> tuple[Any, ...]:
    """Leaves of one kind share a loop."""
    size = matrix.size
    sizes = tuple((size(x.axes), size(x.others)) for x in matrix.sides)
    dtypes = (x.dtype for x in (gradient, *jax.tree.leaves(projectors[0])))
    return (sizes, matrix.rank, matrix.storage, *dtypes)


def leaves_of(
    matrices: Sequence[Matrix],
    gradients: Sequence[jax.Array],
    projectors: Sequence[Projectors],
) -> list[Leaf]:
    starts = np.cumsum([0, *(matrix.count for matrix in matrices)])
    return [
        _leaf(matrix, int(start), gradient, pair)
        for matrix, start, gradient, pair in zip(
            matrices, starts, gradients, projectors, strict=False
        )
    ]


def _leaf(
    matrix: Matrix, start: int, gradient: jax.Array, projectors: Projectors
) -> Leaf:
    def stack(x: jax.Array) -> jax.Array:
        entries = x.size // (matrix.count * matrix.rank)
        return lax.reshape(x, (matrix.count, entries, matrix.rank))

    # Traced here once, and not for each way to loop.
    stacks = tuple(jax.tree.map(stack, projector) for projector in projectors)
    gradient = place(gradient, replicated(explicit_sharding(gradient)))
    return Leaf(matrix, start, gradient, projectors, stacks)


def groups_of(leaves: Sequence[Leaf], several: bool) -> list["Group"]:
    """By kind; where several matrices share a turn, a leaf that has as many is its own.

    Its projectors are then renewed where they lie. Joining leaves takes a copy of all
    projectors of a kind, and one more to take them apart, but compiles fewer loops.
    """
    found: dict[Any, list[int]] = {}
    for position, leaf in enumerate(leaves):
        alone = several and leaf.matrix.count >= _ALONE
        found.setdefault((leaf.kind, position if alone else None), []).append(position)
    return [Group(x, [leaves[i] for i in x]) for x in found.values()]


@dataclasses.dataclass(frozen=True)
class Group:
    """Leaves of one kind; entries count their matrices, leaf by leaf."""

    positions: Sequence[int]  # of the leaves among all
    leaves: Sequence[Leaf]

    @property
    def counts(self) -> list[int]:
        return [leaf.matrix.count for leaf in self.leaves]

    @property
    def entries(self) -> np.ndarray:
        """Where its matrices are among those at hand."""
        return np.concatenate([leaf.entries for leaf in self.leaves])

    @property
    def at_once(self) -> int:
        """Matrices in one turn of the loop, on accelerators."""
        matrix, gradient = self.leaves[0].matrix, self.leaves[0].gradient
        entries = matrix.size(matrix.rows) * matrix.size(matrix.cols)
        size = gradient.dtype.itemsize * entries
        # Half of them, or copies of a small model's would be a share of its step.
        most = min(sum(self.counts) // 2, _AT_ONCE, _AT_ONCE_BYTES // size)
        return max(1, most)

    def views(self, entries: jax.Array) -> list[jax.Array]:
        """The gradients of some matrices, by side: (matrices, projected, other)."""
        cuts = tuple(leaf.cut for leaf in self.leaves)
        gradients = [leaf.gradient for leaf in self.leaves]

        def one(entry: jax.Array) -> list[jax.Array]:
            return _views(cuts, gradients, entry)

        if len(entries) > 1:
            return lax.map(one, entries)
        return [view[None] for view in one(entries[0])]


# Compiled by themselves so that one by one and several at once share a trace, as do
# leaves that are built alike.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _views(
    cuts: tuple[Cut, ...], gradients: Sequence[jax.Array], entry: jax.Array
) -> list[jax.Array]:
    """The gradients of one entry of leaves that are so cut."""
    counts = [math.prod(cut.batch_shape) for cut in cuts]
    leaf_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    within = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
    place_of = (at(jnp.asarray(table), entry) for table in (leaf_of, within))
    return _pick(cuts, gradients, *place_of)


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _pick(
    cuts: tuple[Cut, ...],
    gradients: Sequence[jax.Array],
    position: jax.Array,
    number: jax.Array,
) -> list[jax.Array]:
    """The gradients of the matrix with a number in the leaf at a position.

    JAX takes a time to trace a switch that grows with the square of its branches, so
    that many of them are made two levels.
    """
    if len(cuts) <= _BRANCHES:
        picks = [functools.partial(_pick_one, cut, i) for i, cut in enumerate(cuts)]
        return lax.switch(position, picks, gradients, number)
    size = math.isqrt(len(cuts))
    picks = [
        functools.partial(_pick_among, cuts[start : start + size], start)
        for start in range(0, len(cuts), size)
    ]
    return lax.switch(position // size, picks, gradients, position % size, number)


def _pick_one(
    cut: Cut, position: int, gradients: Sequence[jax.Array], number: jax.Array
) -> list[jax.Array]:
    return cut.views(gradients[position], number)


def _pick_among(
    cuts: tuple[Cut, ...],
    start: int,
    gradients: Sequence[jax.Array],
    *place_of: jax.Array,
) -> list[jax.Array]:
    return _pick(cuts, gradients[start:][: len(cuts)], *place_of)


def each(function: Callable[..., Any], size: int) -> Callable[..., Any]:
    """`function` for each entry of leading axes, but no batch where there is one."""
    if size > 1:
        return jax.vmap(function)

    def once(*arguments: Any) -> Any:
        result = function(*jax.tree.map(lambda x: x[0], arguments))
        return jax.tree.map(lambda x: x[None], result)

    return once


def split(
    group: Sequence[Leaf], stacks: Projectors, step: jax.Array
) -> list[Projectors]:
    """The projectors of each leaf, out of the stacks of all."""
    counts = [leaf.matrix.count for leaf in group]

    def apart(stack: jax.Array, *olds: jax.Array) -> list[jax.Array]:
        return parts(stack, counts, [old.shape for old in olds], step)

    olds = [leaf.projectors for leaf in group]
    found = jax.tree.map(apart, stacks, *olds)
    return list(jax.tree.transpose(jax.tree.structure(stacks), None, found))


def parts(
    stacks: Tree,
    sizes: Sequence[int],
    shapes: Sequence[tuple[int, ...]],
    step: jax.Array,
) -> list[Tree]:
    """Stacks cut along their first axis into such sizes, each part of another shape."""
    if len(sizes) == 1:
        return [jax.tree.map(lambda stack: stack.reshape(shapes[0]), stacks)]
    starts = unknown(np.cumsum([0, *sizes[:-1]]).tolist(), step)
    return [
        _part(start, size, shape, stacks)
        for start, size, shape in zip(starts, sizes, shapes, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _part(start: jax.Array, size: int, shape: tuple[int, ...], stacks: Tree) -> Tree:
    def cut(stack: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(stack, start, size).reshape(shape)

    return jax.tree.map(cut, stacks)


def at(stack: jax.Array, entry: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(stack, entry, keepdims=False)
