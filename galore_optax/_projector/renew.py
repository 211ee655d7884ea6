# SPDX-License-Identifier: Apache-2.0
"""New bases for the matrices that are due, each checked before it is taken.

The matrices of one size, from whichever leaves, are of one kind and share a loop over
those that are due: no work is done for the others, the workspace of a few is held, and
a model compiles a handful of loops however deep it is. A turn of the loop takes several
matrices at once where launching a kernel costs more than what a small one does, and one
on CPU.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from galore_optax._projector.groups import Group, Leaf, at, each, groups_of, split
from galore_optax._projector.project import accumulation_dtype
from galore_optax._storage.numbers import Numbers
from galore_optax._storage.projectors import Projectors, Storage
from galore_optax._xla.order import row_major
from galore_optax.subspace import ByStep, Subspace
from galore_optax.subspace._base import matmul

# Householder QR and LAPACK stay near 1e-6, the slowest accelerator's eigensolvers near
# 1e-5; a basis that lost a direction is wrong by 1. bf16 storage adds 4e-3 later.
ORTHONORMALITY_TOLERANCE = 1e-3

_SPREAD = 0x9E3779B1  # 2³² over the golden ratio, odd

Found: TypeAlias = tuple[list[Projectors], jax.Array]


class Run(NamedTuple):
    """What all matrices share."""

    method: Subspace
    key: jax.Array
    step: jax.Array
    align_signs: bool = False

    def key_of(self, name: jax.Array) -> jax.Array:
        # One fold for both: each is a kernel of its own to compile. Steps are spread
        # over all numbers, far from those of a leaf's matrices, which are neighbours.
        turn = self.step.astype(jnp.uint32) * np.uint32(_SPREAD)
        return jax.random.fold_in(self.key, turn + name)


class Turn(NamedTuple):
    """What a refresh knows of some matrices, one entry each."""

    lanes: Any  # due in any lane of a vmap
    owed: Any  # due in this one
    cold: Any  # never refreshed
    names: Any  # by path and index, uint32

    def at(self, entries: np.ndarray) -> "Turn":
        """Of some matrices only, which are known when tracing."""
        if np.array_equal(entries, np.arange(len(self.owed))):
            return self
        return Turn(*(x[entries] for x in self))


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
    joined, apart = groups_of(leaves, False), groups_of(leaves, True)
    sizes = [group.at_once if together else 1 for group in apart]
    if [x.positions for x in joined] == [x.positions for x in apart]:
        return _renew_all(joined, turn, run, sizes)
    return lax.platform_dependent(
        cpu=functools.partial(_renew_all, joined, turn, run, [1] * len(joined)),
        default=functools.partial(_renew_all, apart, turn, run, sizes),
    )


def _renew_all(
    groups: Sequence[Group], turn: Turn, run: Run, sizes: Sequence[int]
) -> Found:
    order = np.concatenate([group.entries for group in groups])
    due = _due(turn.at(order), run)
    results, first = [], 0
    for group, size in zip(groups, sizes, strict=True):
        results.append(_renew_group(group, first, due, run, size))
        first += sum(group.counts)
    return gathered(groups, results)


def gathered(groups: Sequence[Group], results: Sequence[Found]) -> Found:
    """What was found for each group, in the order of all leaves and matrices."""
    found: dict[int, Projectors] = {}
    for group, (projectors, _) in zip(groups, results, strict=True):
        found.update(zip(group.positions, projectors, strict=True))
    accepted = jnp.concatenate([taken for _, taken in results])
    order = np.argsort(np.concatenate([group.entries for group in groups]))
    accepted = accepted if len(groups) == 1 else accepted[order]
    return [found[position] for position in sorted(found)], accepted


class _Due(NamedTuple):
    """What a refresh knows of all matrices at hand, group by group."""

    lanes: jax.Array
    owed: jax.Array
    cold: jax.Array
    keys: jax.Array


def _due(turn: Turn, run: Run) -> _Due:
    # Keys of all at once: in each loop they would be compiled again.
    keys = jax.vmap(run.key_of)(jnp.asarray(turn.names))
    return _Due(turn.lanes, turn.owed, turn.cold, keys)


class _Loop(NamedTuple):
    chunk: jax.Array  # done last
    stacks: Projectors  # of all leaves of the kind, still coded where they are
    accepted: jax.Array  # (matrices of the kind,)


class _Chunks(NamedTuple):
    """The matrices of a group, so many a turn; the last chunk overlaps the one before.

    One by one, a matrix is numbered as among all at hand, so that the search for the
    next one is the same for every group, and compiled once.
    """

    size: int
    firsts: np.ndarray  # (chunks,) the first matrix of each
    members: np.ndarray  # (chunks, size) matrices
    fresh: np.ndarray  # (chunks, size) whether a matrix is in no earlier chunk

    @property
    def numbers(self) -> tuple[int, int]:
        """From the first chunk to the last."""
        if self.size == 1:
            return int(self.firsts[0]), int(self.firsts[-1])
        return 0, len(self.firsts) - 1

    def due(self, lanes: jax.Array) -> jax.Array:
        """Whether each chunk has a matrix that is due."""
        if self.size == 1:
            return lanes
        return jnp.any(lanes[self.members] & self.fresh, axis=1)

    def first(self, chunk: jax.Array) -> jax.Array:
        return chunk if self.size == 1 else at(jnp.asarray(self.firsts), chunk)


def _chunks(first: int, count: int, size: int) -> _Chunks:
    starts = np.arange(0, count, size, dtype=np.int32)
    firsts = np.minimum(starts, count - size)
    members = firsts[:, None] + np.arange(size, dtype=np.int32)
    fresh = members >= starts[:, None]
    return _Chunks(size, first + firsts, first + members, fresh)


def _renew_group(group: Group, first: int, due: _Due, run: Run, size: int) -> Found:
    """Renews the matrices of a group that are due in any lane, `size` a turn, or 1.

    `first` is the number of its first one.
    """
    stacks = [leaf.stacks for leaf in group.leaves]
    joined = jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)
    # False and 0, but made of what varies over devices: inside `shard_map` a carry has
    # to vary from the start.
    none = due.owed[first : first + sum(group.counts)] & False
    start = _Loop(jnp.min(none.astype(jnp.int32)), joined, none)
    loop = functools.partial(_loop, group, first, due, run)
    if size == 1:
        end = loop(1, start)
    else:
        several = functools.partial(loop, size)
        end = lax.platform_dependent(
            start, cpu=functools.partial(loop, 1), default=several
        )
    return split(group.leaves, end.stacks, run.step), end.accepted


def _loop(
    group: Group, start_at: int, due: _Due, run: Run, size: int, start: _Loop
) -> _Loop:
    """A turn for every `size` matrices of which one is due."""
    chunks = _chunks(start_at, sum(group.counts), size)
    pending, (lowest, highest) = chunks.due(due.lanes), chunks.numbers
    storage = group.leaves[0].matrix.storage
    propose = functools.partial(
        _propose, run.method, storage, run.align_signs, run.step
    )

    def more(state: _Loop) -> jax.Array:
        return _next(pending, state.chunk) <= highest

    def body(state: _Loop) -> _Loop:
        chunk = _next(pending, state.chunk)
        number = chunks.first(chunk)
        first = number - start_at  # in the group

        def now(first: jax.Array, stack: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(
                stack, first, size, allow_negative_indices=False
            )

        def put(stack: jax.Array, part: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(
                stack, row_major(part), first, 0, allow_negative_indices=False
            )

        mine = _Due(*(now(number, x) for x in due))
        old = jax.tree.map(functools.partial(now, first), state.stacks)
        views = group.views(first + jnp.arange(size, dtype=jnp.int32))
        new, sound = each(propose, size)(views, old, mine.keys, mine.cold)
        accept = sound & mine.owed
        if size > 1:
            accept &= at(jnp.asarray(chunks.fresh), chunk)
        kept = jax.tree.map(functools.partial(_choose, accept), new, old)
        taken = put(state.accepted, accept | now(first, state.accepted))
        return _Loop(chunk, jax.tree.map(put, state.stacks, kept), taken)

    before = start._replace(chunk=start.chunk + (lowest - 1))
    return lax.while_loop(more, body, before)


def _next(due: jax.Array, last: jax.Array) -> jax.Array:
    """The first chunk after `last` that is due, or what is above all chunks."""
    chunks = jnp.arange(len(due), dtype=jnp.int32)
    return jnp.min(jnp.where(due & (chunks > last), chunks, len(due)))


def _choose(accept: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(jnp.expand_dims(accept, range(1, new.ndim)), new, old)


# Compiled by itself so that one by one and several at once share its trace.
@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def _propose(
    method: Subspace,
    storage: Storage,
    align_signs: bool,
    step: jax.Array,
    gradients: Sequence[jax.Array],
    previous: Projectors,
    key: jax.Array,
    cold: jax.Array,
) -> tuple[Projectors, jax.Array]:
    """A new basis for each side, stored, and whether all of them may be used."""
    dtype = accumulation_dtype(gradients[0])
    size = jnp.max(jnp.abs(gradients[0])).astype(dtype)
    usable = jnp.isfinite(size) & (size > 0)
    # Dividing first makes the basis independent of the gradient's scale, squares of
    # 1e±30 included, and keeps NaN away from LAPACK.
    units = [jnp.where(usable, x.astype(dtype) / size, 0) for x in gradients]
    keys = [key_of_side(key, number) for number in range(len(units))]
    sides = list(zip(units, previous, keys, strict=True))
    if isinstance(storage, Numbers):
        return tuple(storage.found(*side, cold) for side in sides), usable
    find = method.basis
    if isinstance(method, ByStep):
        find = functools.partial(method.basis_at, step)
    bases = []
    for unit, stored, of_side in sides:
        rank = jax.tree.leaves(stored)[0].shape[1]
        old = storage.decode(stored, (len(unit), rank), dtype).astype(dtype)
        basis = find(unit, old, of_side, cold)
        check_shape(method, basis, unit.shape, rank)
        bases.append(aligned(basis, old) if align_signs else basis)
    new, sound = store(method, storage, bases, previous)
    return new, usable & sound


def aligned(basis: jax.Array, old: jax.Array) -> jax.Array:
    """`basis`, its columns with the signs that bring them nearer to the old ones."""
    products = jnp.sum(old * basis, axis=0, keepdims=True)
    return basis * jnp.where(products < 0, -1, 1).astype(basis.dtype)


def key_of_side(key: jax.Array, number: int) -> jax.Array:
    return key if number == 0 else jax.random.fold_in(key, number)


def store(
    method: Subspace,
    storage: Storage,
    bases: Sequence[jax.Array],
    previous: Projectors,
) -> tuple[Projectors, jax.Array]:
    """New bases stored as those before, and whether all of them are sound."""
    # The check is of what the method found: few bits are not as orthonormal.
    sound = functools.reduce(jnp.logical_and, [_sound(method, x) for x in bases])
    return tuple(map(storage.encode, bases, previous)), sound


def check_shape(
    method: Subspace, basis: jax.Array, shape: tuple[int, ...], rank: int
) -> None:
    if basis.shape != (shape[0], rank):
        raise ValueError(
            f"{method!r} returned a basis of shape {basis.shape} for a gradient of"
            f" shape {shape}; it must be (m, rank) = {(shape[0], rank)}."
        )


def _sound(method: Subspace, basis: jax.Array) -> jax.Array:
    if not method.orthonormal:
        return jnp.all(jnp.isfinite(basis))
    error = matmul(basis.T, basis) - jnp.eye(basis.shape[1], dtype=basis.dtype)
    return jnp.max(jnp.abs(error)) <= ORTHONORMALITY_TOLERANCE  # false for NaN
