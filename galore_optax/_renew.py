# SPDX-License-Identifier: Apache-2.0
"""New bases for the matrices that are due, each checked before it is taken.

The matrices of one size, from whichever leaves, are of one kind and share a loop over
those that are due: no work is done for the others, the workspace of a few is held, and
a model compiles a handful of loops however deep it is. A turn of the loop takes several
matrices at once where launching a kernel costs more than what a small one does, and one
on CPU.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from galore_optax._matrices import Matrix, Side
from galore_optax._projection import accumulation_dtype
from galore_optax._sharding import explicit_sharding, place, replicated
from galore_optax._stored import Projectors, Storage
from galore_optax.subspace import Subspace
from galore_optax.subspace._base import matmul

# Householder QR and LAPACK stay near 1e-6, the slowest accelerator's eigensolvers near
# 1e-5; a basis that lost a direction is wrong by 1. bf16 storage adds 4e-3 later.
ORTHONORMALITY_TOLERANCE = 1e-3
_BRANCHES = 16  # of one switch
_AT_ONCE = 8  # matrices in one turn, where that is worth it, and
_AT_ONCE_BYTES = 2**30  # of their gradients in f32

Found: TypeAlias = tuple[list[Projectors], jax.Array]


class Run(NamedTuple):
    """What all matrices share."""

    method: Subspace
    key: jax.Array
    step: jax.Array
    total: int  # matrices in the whole tree

    def key_of(self, number: jax.Array) -> jax.Array:
        # One fold for both: each is a kernel of its own to compile.
        turn = self.step.astype(jnp.uint32) * self.total
        return jax.random.fold_in(self.key, turn + number.astype(jnp.uint32))


class Turn(NamedTuple):
    """What a refresh knows of some matrices, one entry each."""

    lanes: Any  # due in any lane of a vmap
    owed: Any  # due in this one
    cold: Any  # never refreshed
    numbers: Any  # among those of the whole tree

    def at(self, entries: np.ndarray) -> "Turn":
        """Of some matrices only, which are known when tracing."""
        if np.array_equal(entries, np.arange(len(self.owed))):
            return self
        return Turn(*(x[entries] for x in self))


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The matrices of one leaf."""

    matrix: Matrix
    start: int  # of its matrices among those at hand
    gradient: jax.Array
    projectors: Projectors

    @property
    def kind(self) -> tuple[Any, ...]:
        """Leaves of one kind share a loop."""
        sizes = tuple(self.size(side) for side in self.matrix.sides)
        arrays = self.gradient, *jax.tree.leaves(self.projectors[0])
        dtypes = (x.dtype for x in arrays)
        return (sizes, self.matrix.rank, self.matrix.storage, *dtypes)

    @property
    def entries(self) -> np.ndarray:
        return self.start + np.arange(self.matrix.count)

    def size(self, side: Side) -> tuple[int, int]:
        return self.matrix.size(side.axes), self.matrix.size(side.others)

    def pick(self, gradient: jax.Array, number: jax.Array) -> list[jax.Array]:
        """The gradient of one matrix, for each side (projected side, other side)."""
        shape = self.matrix.batch_shape
        if shape:
            index = jnp.unravel_index(number, shape)
            for axis, place_on_axis in zip(self.matrix.batch, index, strict=True):
                gradient = lax.dynamic_slice_in_dim(gradient, place_on_axis, 1, axis)
        return [
            gradient.transpose(*self.matrix.batch, *side.axes, *side.others).reshape(
                self.size(side)
            )
            for side in self.matrix.sides
        ]

    def stacks(self) -> Projectors:
        """The projectors, every array of them as (matrices, entries, rank)."""

        def stack(x: jax.Array) -> jax.Array:
            return x.reshape(self.matrix.count, -1, self.matrix.rank)

        return jax.tree.map(stack, self.projectors)


def leaves_of(
    matrices: Sequence[Matrix],
    gradients: Sequence[jax.Array],
    projectors: Sequence[Projectors],
) -> list[Leaf]:
    starts = np.cumsum([0, *(matrix.count for matrix in matrices)])
    return [
        Leaf(matrix, int(start), place(g, replicated(explicit_sharding(g))), pair)
        for matrix, start, g, pair in zip(
            matrices, starts, gradients, projectors, strict=False
        )
    ]


def renew_leaves(
    leaves: Sequence[Leaf], turn: Turn, run: Run, *, together: bool
) -> Found:
    """New projectors by leaf, and which matrices took one.

    Args:
      leaves: all of them.
      turn: of their matrices.
      run: of all.
      together: whether matrices become due together, so that they may share a turn.

    Returns:
      projectors, and a bool a matrix.
    """
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for position, leaf in enumerate(leaves):
        kinds.setdefault(leaf.kind, []).append(position)
    groups = [_Group([leaves[i] for i in positions]) for positions in kinds.values()]
    one_by_one = functools.partial(_renew_groups, groups, turn, run, lambda group: 1)
    if together and any(group.at_once > 1 for group in groups):
        several = functools.partial(
            _renew_groups, groups, turn, run, operator.attrgetter("at_once")
        )
        found, accepted = lax.platform_dependent(cpu=one_by_one, default=several)
    else:
        found, accepted = one_by_one()
    order = np.argsort(np.concatenate(list(kinds.values())))
    return [found[position] for position in order], accepted


@dataclasses.dataclass(frozen=True)
class _Group:
    """The leaves of one kind; entries count their matrices, leaf by leaf."""

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
        matrix = self.leaves[0].matrix
        size = 4 * matrix.size(matrix.rows) * matrix.size(matrix.cols)
        return min(sum(self.counts), _AT_ONCE, max(1, _AT_ONCE_BYTES // size))

    def views(self, entries: jax.Array) -> list[jax.Array]:
        """The gradients of some matrices, by side: (matrices, projected, other)."""
        gradients = [leaf.gradient for leaf in self.leaves]
        one = functools.partial(self._pick, gradients)
        return _each(one, len(entries), lax.map)(entries)

    @functools.cached_property
    def _pick(self) -> Callable[..., list[jax.Array]]:
        # Compiled by itself so that one by one and several at once share its trace.
        counts = self.counts
        leaf_of = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        within = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])

        def pick(gradients: Sequence[jax.Array], entry: jax.Array) -> list[jax.Array]:
            place_of = (_at(jnp.asarray(table), entry) for table in (leaf_of, within))
            return _pick(self.leaves, gradients, *place_of)

        return jax.jit(pick)


def _renew_groups(
    groups: Sequence[_Group],
    turn: Turn,
    run: Run,
    at_once: Callable[[_Group], int],
) -> Found:
    found: list[Projectors] = []
    accepted: list[jax.Array] = []
    entries = [group.entries for group in groups]
    for group, mine in zip(groups, entries, strict=True):
        projectors, taken = _renew_kind(group, turn.at(mine), run, at_once(group))
        found.extend(projectors)
        accepted.append(taken)
    order = np.argsort(np.concatenate(entries))
    joined = jnp.concatenate(accepted)
    return found, joined if len(groups) == 1 else joined[order]


class _Loop(NamedTuple):
    chunk: jax.Array  # done last
    stacks: Projectors  # of all leaves of the kind, still coded where they are
    accepted: jax.Array  # (matrices of the kind,)


class _Chunks(NamedTuple):
    """The matrices of a kind, so many a turn; the last chunk overlaps the one before.

    Entries count the matrices of the kind, leaf by leaf.
    """

    size: int
    firsts: np.ndarray  # (chunks,) the first entry of each
    members: np.ndarray  # (chunks, size) entries
    fresh: np.ndarray  # (chunks, size) whether an entry is in no earlier chunk

    def due(self, lanes: jax.Array) -> jax.Array:
        """Whether each chunk has a matrix that is due."""
        if self.size == 1:
            return lanes
        return jnp.any(lanes[self.members] & self.fresh, axis=1)


def _chunks(count: int, size: int) -> _Chunks:
    starts = np.arange(0, count, size, dtype=np.int32)
    firsts = np.minimum(starts, count - size)
    members = firsts[:, None] + np.arange(size, dtype=np.int32)
    return _Chunks(size, firsts, members, members >= starts[:, None])


def _renew_kind(group: _Group, turn: Turn, run: Run, size: int) -> Found:
    """Loops over the matrices of one kind that are due in any lane, `size` a turn."""
    chunks = _chunks(sum(group.counts), size)
    due = chunks.due(turn.lanes)
    propose = functools.partial(_propose, run.method, group.leaves[0].matrix.storage)

    def body(_: jax.Array, state: _Loop) -> _Loop:
        chunk = _next(due, state.chunk)
        first = chunk if size == 1 else _at(jnp.asarray(chunks.firsts), chunk)

        def now(stack: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(stack, first, size)

        def put(stack: jax.Array, part: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(stack, part, first, 0)

        mine, old = Turn(*map(now, turn)), jax.tree.map(now, state.stacks)
        views = group.views(first + jnp.arange(size, dtype=jnp.int32))
        keys = _each(run.key_of, size)(mine.numbers)
        new, sound = _each(propose, size)(views, old, keys, mine.cold)
        accept = sound & mine.owed
        if size > 1:
            accept &= _at(jnp.asarray(chunks.fresh), chunk)
        kept = jax.tree.map(functools.partial(_choose, accept), new, old)
        taken = put(state.accepted, accept | now(state.accepted))
        return _Loop(chunk, jax.tree.map(put, state.stacks, kept), taken)

    stacks = [leaf.stacks() for leaf in group.leaves]
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)
    # No constants: inside `shard_map` a carry varies over devices from the start.
    none = turn.owed & False
    start = _Loop(jnp.min(none.astype(jnp.int32)) - 1, joined, none)
    end = lax.fori_loop(0, jnp.sum(due), body, start)
    return _split(group.leaves, end.stacks, run.step), end.accepted


def _next(due: jax.Array, last: jax.Array) -> jax.Array:
    """The first chunk after `last` that is due."""
    chunks = jnp.arange(len(due), dtype=jnp.int32)
    return jnp.min(jnp.where(due & (chunks > last), chunks, len(due)))


def _each(
    function: Callable[..., Any], size: int, over: Callable[..., Any] = jax.vmap
) -> Callable[..., Any]:
    """`function` for each entry of leading axes, but no batch where there is one."""
    if size > 1:
        return over(function) if over is jax.vmap else functools.partial(over, function)

    def once(*arguments: Any) -> Any:
        result = function(*jax.tree.map(lambda x: x[0], arguments))
        return jax.tree.map(lambda x: x[None], result)

    return once


def _choose(accept: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(jnp.expand_dims(accept, range(1, new.ndim)), new, old)


def _pick(
    leaves: Sequence[Leaf],
    gradients: Sequence[jax.Array],
    position: jax.Array,
    number: jax.Array,
) -> list[jax.Array]:
    """The gradients of the matrix with a number in the leaf at a position.

    JAX takes a time to trace a switch that grows with the square of its branches, so
    that many of them are made two levels.
    """
    pairs = list(zip(leaves, gradients, strict=True))
    if len(pairs) <= _BRANCHES:
        picks = [functools.partial(leaf.pick, gradient) for leaf, gradient in pairs]
        return lax.switch(position, picks, number)
    size = math.isqrt(len(pairs))
    branches = [
        functools.partial(_pick, leaves[start : start + size], gradients[start:][:size])
        for start in range(0, len(pairs), size)
    ]
    return lax.switch(position // size, branches, position % size, number)


def _split(
    group: Sequence[Leaf], stacks: Projectors, step: jax.Array
) -> list[Projectors]:
    """The projectors of each leaf, out of the stacks of all."""
    sizes = [leaf.matrix.count for leaf in group]
    starts = _opaque(np.cumsum([0, *sizes[:-1]]).tolist(), step)

    return [
        jax.tree.map(functools.partial(_part, start, size), stacks, leaf.projectors)
        for leaf, start, size in zip(group, starts, sizes, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=1)
def _part(start: jax.Array, size: int, stack: jax.Array, old: jax.Array) -> jax.Array:
    return lax.dynamic_slice_in_dim(stack, start, size).reshape(old.shape)


def _opaque(numbers: Sequence[int], step: jax.Array) -> tuple[jax.Array, ...]:
    """`numbers`, which the compiler cannot tell from others.

    A slice with a known start is a kernel of its own, and XLA's CPU compiler spends
    6 ms on each; with unknown ones all leaves share one.
    """
    return lax.cond(
        step >= 0,
        lambda: tuple(jnp.int32(number) for number in numbers),
        lambda: tuple(jnp.int32(0) for _ in numbers),
    )


def _at(stack: jax.Array, entry: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(stack, entry, keepdims=False)


def _propose(
    method: Subspace,
    storage: Storage,
    gradients: Sequence[jax.Array],
    previous: Projectors,
    key: jax.Array,
    cold: jax.Array,
) -> tuple[Projectors, jax.Array]:
    """A new basis for each side, stored, and whether all of them may be used."""
    dtype = accumulation_dtype(gradients[0])
    size = jnp.max(jnp.abs(gradients[0])).astype(dtype)
    usable = jnp.isfinite(size) & (size > 0)
    bases, sound = [], usable
    for number, (gradient, stored) in enumerate(zip(gradients, previous, strict=True)):
        # Dividing first makes the basis independent of the gradient's scale, squares of
        # 1e±30 included, and keeps NaN away from LAPACK.
        unit = jnp.where(usable, gradient.astype(dtype) / size, 0)
        side_key = key if number == 0 else jax.random.fold_in(key, number)
        shape = (len(gradient), jax.tree.leaves(stored)[0].shape[1])
        old = storage.decode(stored, shape, dtype)
        basis = method.basis(unit, old.astype(dtype), side_key, cold)
        _check_shape(method, basis, gradient, shape)
        # The check is of what the method found: few bits are not as orthonormal.
        sound = sound & _sound(method, basis)
        bases.append(storage.encode(basis, stored))
    return tuple(bases), sound


def _check_shape(
    method: Subspace, basis: jax.Array, gradient: jax.Array, shape: tuple[int, int]
) -> None:
    if basis.shape != shape:
        raise ValueError(
            f"{method!r} returned a basis of shape {basis.shape} for a gradient of"
            f" shape {gradient.shape}; it must be (m, rank) = {shape}."
        )


def _sound(method: Subspace, basis: jax.Array) -> jax.Array:
    if not method.orthonormal:
        return jnp.all(jnp.isfinite(basis))
    error = matmul(basis.T, basis) - jnp.eye(basis.shape[1], dtype=basis.dtype)
    return jnp.max(jnp.abs(error)) <= ORTHONORMALITY_TOLERANCE  # false for NaN
