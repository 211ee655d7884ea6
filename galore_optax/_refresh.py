# SPDX-License-Identifier: Apache-2.0
"""When a subspace is refreshed, and how a new basis is checked before it is taken.

All matrices of a tree share one conditional, so that a step on which nothing is due
costs one host round trip at most. Inside it the matrices of one size, from whichever
leaves, share one loop over those that are due: no work is done for the others, one
matrix' workspace is held, and a model compiles a handful of loops however deep it is.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from galore_optax._matrices import Matrix, Numbering, Plan, Side
from galore_optax._projection import accumulation_dtype
from galore_optax._sharding import explicit_sharding, place, replicated
from galore_optax._stored import Projectors, Storage
from galore_optax.subspace import Subspace
from galore_optax.subspace._base import matmul

# Householder QR and LAPACK stay near 1e-6, the slowest accelerator's eigensolvers near
# 1e-5; a basis that lost a direction is wrong by 1. bf16 storage adds 4e-3 later.
ORTHONORMALITY_TOLERANCE = 1e-3

_BRANCHES = 16  # of one switch

When: TypeAlias = bool | jax.Array | None


class Refresh(NamedTuple):
    """What each matrix needs to know about its own refreshing.

    One entry a matrix, leaf by leaf in the order of the tree, and in row-major order
    over the batch axes of a leaf.
    """

    # shape=(matrices,), int32: count at its last refresh, -1 before any
    last: Any
    # shape=(matrices,), int32: new bases that failed the check
    refused: Any  # both MaskedNode in a part of a tree without a matrix


def initial_refresh(matrices: Sequence[Matrix]) -> Refresh:
    total = sum(matrix.count for matrix in matrices)
    if not total:  # a part of a tree; checkpointers refuse arrays without entries
        return Refresh(optax.MaskedNode(), optax.MaskedNode())
    return Refresh(jnp.full(total, -1, jnp.int32), jnp.zeros(total, jnp.int32))


@dataclasses.dataclass(frozen=True)
class Calendar:
    """When each matrix of a tree is to be refreshed; works on the host and traced."""

    gaps: Any  # (matrices,) or scalar
    shifts: Any  # likewise: where in its gap a matrix is refreshed

    def latest(self, count: Any) -> Any:
        """The last step up to `count` at which each matrix was to be refreshed.

        Negative before a shifted matrix' second refresh; the first, at step 0, is
        everyone's.
        """
        return (count - self.shifts) // self.gaps * self.gaps + self.shifts

    def owed(self, refresh: Refresh, count: Any) -> Any:
        """Whether a refresh is outstanding: never done, or older than the schedule."""
        return (refresh.last < 0) | (refresh.last < self.latest(count))


def calendar(plan: Plan, stagger: bool) -> Calendar:
    """Multiples of each gap; with `stagger`, shifted by an even share of it."""
    matrices, (numbers, total) = plan.projected, plan.numbering
    counts = [matrix.count for matrix in matrices]
    gaps: Any
    if any(isinstance(matrix.gap, jax.Array) for matrix in matrices):
        gaps = jnp.stack([jnp.asarray(m.gap, jnp.int32) for m in matrices])
        gaps = jnp.repeat(gaps, np.array(counts), total_repeat_length=sum(counts))
    else:
        gaps = np.repeat([matrix.gap for matrix in matrices], counts).astype(np.int32)
    return Calendar(gaps, _share(gaps, numbers, total) if stagger else 0 * gaps)


def _share(gap: Any, number: Any, total: int) -> Any:
    """`gap * number // total`, in which no product leaves the range of int32."""
    return gap // total * number + gap % total * number // total


@jax.custom_batching.custom_vmap
def _any_lane(flags: jax.Array) -> jax.Array:
    """`flags`, joined by `or` over every axis that `jax.vmap` adds.

    A batched predicate would turn the conditional into a select that runs both branches
    on every step, and a batched loop counter every slice into a gather.
    """
    return flags


@_any_lane.def_vmap
def _any_of_lanes(
    axis_size: int, in_batched: list[bool], flags: jax.Array
) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return _any_lane(jnp.any(flags, axis=0)), False


def refresh_when_due(
    plan: Plan,
    gradients: Sequence[jax.Array],
    projectors: list[Projectors],
    refresh: Refresh,
    *,
    method: Subspace,
    stagger: bool,
    count: jax.Array,
    key: jax.Array,
    when: When,
) -> tuple[list[Projectors], Refresh]:
    """New projectors for every matrix that is due, the old ones for the rest.

    Args:
      plan: what is projected.
      gradients: of the projected leaves, full size.
      projectors: theirs.
      refresh: of all their matrices.
      method: finds the bases.
      stagger: spread refreshes over the gap.
      count: step, int32 scalar.
      key: raw PRNG key of the whole run.
      when: `None`, what is due; `False`, nothing; `True`, everything; a traced bool,
        what is due if it holds.

    Returns:
      projectors and refresh.
    """
    if when is False or not plan.projected:
        return projectors, refresh
    # Bases are constants of a step: what differentiates through it differentiates the
    # products with them. Loops whose length depends on values have no reverse mode.
    gradients, projectors = lax.stop_gradient((gradients, projectors))
    owed = calendar(plan, stagger).owed(refresh, count)
    owed = jnp.ones_like(owed) if when is True else owed
    owed = owed if when is None or when is True else owed & when
    lanes = _any_lane(owed)

    def renew(
        old: tuple[list[Projectors], Refresh],
    ) -> tuple[list[Projectors], Refresh]:
        projectors, refresh = old
        cold = refresh.last < 0
        turn = _Turn(method, lanes, owed, cold, key, count, plan.numbering)
        leaves = _leaves(plan.projected, gradients, projectors)
        found, accepted = _renew_all(leaves, turn)
        return found, Refresh(
            last=jnp.where(accepted, count, refresh.last),
            refused=refresh.refused + (owed & ~accepted).astype(jnp.int32),
        )

    if when is True:
        return renew((projectors, refresh))
    # `lax.cond` makes its second function branch 0: the no-op comes first, which spares
    # copies of the operands on older XLA (jax issue 16661).
    return lax.cond(jnp.any(lanes), renew, lambda old: old, (projectors, refresh))


class _Turn(NamedTuple):
    """What a refresh knows of every matrix at hand, one entry each."""

    method: Subspace
    lanes: jax.Array  # due in any lane of a vmap
    owed: jax.Array  # due in this one
    cold: jax.Array  # never refreshed
    key: jax.Array  # of the run
    step: jax.Array
    numbering: Numbering

    def key_of(self, entry: jax.Array) -> jax.Array:
        # One fold for both: each is a kernel of its own to compile.
        turn = self.step.astype(jnp.uint32) * self.numbering.total
        number = self._number(entry).astype(jnp.uint32)
        return jax.random.fold_in(self.key, turn + number)

    def _number(self, entry: jax.Array) -> jax.Array:
        numbers, total = self.numbering
        return entry if len(numbers) == total else _at(jnp.asarray(numbers), entry)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """The matrices of one leaf."""

    matrix: Matrix
    start: int  # of its matrices among those of the tree
    gradient: jax.Array
    projectors: Projectors

    @property
    def kind(self) -> tuple[Any, ...]:
        """Leaves of one kind share a loop."""
        sizes = tuple(self.size(side) for side in self.matrix.sides)
        arrays = self.gradient, *jax.tree.leaves(self.projectors[0])
        dtypes = (x.dtype for x in arrays)
        return (sizes, self.matrix.rank, self.matrix.storage, *dtypes)

    def size(self, side: Side) -> tuple[int, int]:
        return self.matrix.size(side.axes), self.matrix.size(side.others)

    def pick(self, number: jax.Array) -> list[jax.Array]:
        """The gradient of one matrix, for each side (projected side, other side)."""
        shape = self.matrix.batch_shape
        gradient = self.gradient
        if shape:
            index = jnp.unravel_index(number - self.start, shape)
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


def _leaves(
    matrices: Sequence[Matrix],
    gradients: Sequence[jax.Array],
    projectors: Sequence[Projectors],
) -> list[_Leaf]:
    starts = np.cumsum([0, *(matrix.count for matrix in matrices)])
    return [
        _Leaf(matrix, int(start), place(g, replicated(explicit_sharding(g))), pair)
        for matrix, start, g, pair in zip(
            matrices, starts, gradients, projectors, strict=False
        )
    ]


def _renew_all(
    leaves: Sequence[_Leaf], turn: _Turn
) -> tuple[list[Projectors], jax.Array]:
    """New projectors by leaf, and which matrices of the tree took one."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for position, leaf in enumerate(leaves):
        kinds.setdefault(leaf.kind, []).append(position)
    found: list[Any] = [None] * len(leaves)
    accepted = turn.owed & False
    for positions in kinds.values():
        group = [leaves[position] for position in positions]
        projectors, accepted = _renew_kind(group, turn, accepted)
        for position, pair in zip(positions, projectors, strict=True):
            found[position] = pair
    return found, accepted


class _Loop(NamedTuple):
    number: jax.Array  # the matrix done last
    stacks: Projectors  # of all leaves of the kind, still coded where they are
    accepted: jax.Array  # of all matrices of the tree


def _renew_kind(
    group: Sequence[_Leaf], turn: _Turn, accepted: jax.Array
) -> tuple[list[Projectors], jax.Array]:
    """Loops over the matrices of one kind that are due in any lane."""
    of_kind, leaf_of, entry_of = _tables(group, len(turn.owed))
    due = turn.lanes & of_kind
    storage = group[0].matrix.storage
    numbers = jnp.arange(len(due), dtype=jnp.int32)

    def body(_: jax.Array, state: _Loop) -> _Loop:
        later = due & (numbers > state.number)
        number = jnp.min(jnp.where(later, numbers, len(numbers)))
        entry = _at(entry_of, number)
        views = _pick(group, _at(leaf_of, number), number)
        old = jax.tree.map(lambda stack: _at(stack, entry), state.stacks)
        cold = _at(turn.cold, number)
        key = turn.key_of(number)
        new, sound = _propose(turn.method, storage, views, old, key, cold)
        accept = sound & _at(turn.owed, number)
        kept = jax.tree.map(lambda *pair: jnp.where(accept, *pair), new, old)
        stacks = jax.tree.map(lambda x, one: _put(x, one, entry), state.stacks, kept)
        return _Loop(number, stacks, _put(state.accepted, accept, number))

    stacks = jax.tree.map(lambda *x: jnp.concatenate(x), *(x.stacks() for x in group))
    # No constant: inside `shard_map` a carry varies over devices from the start.
    before = jnp.min(accepted.astype(jnp.int32)) - 1
    start = _Loop(before, stacks, accepted)
    end = lax.fori_loop(0, jnp.sum(due), body, start)
    return _split(group, end.stacks, turn.step), end.accepted


def _pick(
    group: Sequence[_Leaf], position: jax.Array, number: jax.Array
) -> list[jax.Array]:
    """The gradients of matrix `number`, which is in the leaf at `position`.

    JAX takes a time to trace a switch that grows with the square of its branches, so
    that many of them are made two levels.
    """
    if len(group) <= _BRANCHES:
        return lax.switch(position, [leaf.pick for leaf in group], number)
    size = math.isqrt(len(group))
    parts = [group[start : start + size] for start in range(0, len(group), size)]
    branches = [functools.partial(_pick, part) for part in parts]
    return lax.switch(position // size, branches, position % size, number)


def _tables(
    group: Sequence[_Leaf], total: int
) -> tuple[np.ndarray, jax.Array, jax.Array]:
    """For every matrix of the tree: is it in `group`, in which leaf, at which entry."""
    counts = [leaf.matrix.count for leaf in group]
    numbers = np.concatenate(
        [leaf.start + np.arange(leaf.matrix.count) for leaf in group]
    )
    of_kind = np.zeros(total, bool)
    leaf_of, entry_of = np.zeros((2, total), np.int32)
    of_kind[numbers] = True
    leaf_of[numbers] = np.repeat(np.arange(len(group)), counts)
    entry_of[numbers] = np.arange(len(numbers))
    return of_kind, jnp.asarray(leaf_of), jnp.asarray(entry_of)


def _split(
    group: Sequence[_Leaf], stacks: Projectors, step: jax.Array
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


def _put(stack: jax.Array, one: jax.Array, entry: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(stack, one, entry, 0)


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
