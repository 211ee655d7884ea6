# SPDX-License-Identifier: Apache-2.0
"""When a subspace is refreshed, and how a new basis is checked before it is taken.

All matrices of a tree share one conditional, so that a step on which nothing is due
costs one host round trip at most. Inside it each leaf loops over those of its matrices
that are due: no work is done for the others, and one matrix' workspace is held.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from galore_optax._matrices import Matrix, Side
from galore_optax._projection import accumulation_dtype
from galore_optax._sharding import explicit_sharding, place, replicated
from galore_optax._types import Scalar
from galore_optax.subspace import Subspace
from galore_optax.subspace._base import matmul

# Householder QR and LAPACK stay near 1e-6, the slowest accelerator's eigensolvers near
# 1e-5; a basis that lost a direction is wrong by 1. bf16 storage adds 4e-3 later.
ORTHONORMALITY_TOLERANCE = 1e-3

Projectors: TypeAlias = tuple[jax.Array, ...]  # one, or two for proj_type "full"
When: TypeAlias = bool | jax.Array | None


class Refresh(NamedTuple):
    """What each matrix of a leaf needs to know about its own refreshing."""

    last: jax.Array  # batch shape, int32: count at its last refresh, -1 before any
    refused: jax.Array  # batch shape, int32: how many new bases failed the check


class Member(NamedTuple):
    """One projected leaf, as the refresh sees it."""

    matrix: Matrix
    ordinals: np.ndarray  # batch shape: place of each matrix among all of the tree
    gradient: jax.Array


def initial_refresh(matrix: Matrix) -> Refresh:
    shape = matrix.batch_shape
    return Refresh(jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.int32))


def ordinals(matrices: Sequence[Matrix]) -> list[np.ndarray]:
    """Numbers all matrices of a tree, leaf by leaf."""
    starts = np.cumsum([0, *(matrix.count for matrix in matrices)])
    return [
        start + np.arange(matrix.count).reshape(matrix.batch_shape)
        for start, matrix in zip(starts, matrices, strict=False)
    ]


def latest_scheduled(
    count: Any, gap: Scalar, ordinal: np.ndarray, total: int, stagger: bool
) -> Any:
    """The last step up to `count` at which each matrix was to be refreshed.

    Multiples of `gap`, shifted with `stagger` by an even share of it. Below zero before
    a shifted matrix' second refresh; the first, at step 0, is everyone's.
    """
    shift = ordinal * gap // total if stagger else ordinal * 0
    return (count - shift) // gap * gap + shift


@jax.custom_batching.custom_vmap
def _any(flag: jax.Array) -> jax.Array:
    return flag


@_any.def_vmap
def _any_of_batch(
    axis_size: int, in_batched: list[bool], flag: jax.Array
) -> tuple[jax.Array, bool]:
    # A batched predicate would turn the conditional into a select that runs both
    # branches on every step; the loops inside stay exact for each batch entry.
    del axis_size, in_batched
    return _any(jnp.any(flag, axis=0)), False


def refresh_when_due(
    members: Sequence[Member],
    projectors: list[Projectors],
    refreshes: list[Refresh],
    *,
    method: Subspace,
    stagger: bool,
    count: jax.Array,
    key: jax.Array,
    when: When,
) -> tuple[list[Projectors], list[Refresh]]:
    """New projectors for every matrix that is due, the old ones for the rest.

    Args:
      members: the projected leaves.
      projectors: theirs, in the same order.
      refreshes: theirs, in the same order.
      method: finds the bases.
      stagger: spread refreshes over the gap.
      count: step, int32 scalar.
      key: raw PRNG key of the whole run.
      when: `None`, what is due; `False`, nothing; `True`, everything; a traced bool,
        what is due if it holds.

    Returns:
      projectors and refreshes.
    """
    if when is False:
        return projectors, refreshes
    total = sum(member.matrix.count for member in members)
    owed = [
        jnp.ones(member.matrix.batch_shape, bool)
        if when is True
        else _due(member, refresh, count, total, stagger)
        for member, refresh in zip(members, refreshes, strict=True)
    ]

    def refresh(
        old: tuple[list[Projectors], list[Refresh]],
    ) -> tuple[list[Projectors], list[Refresh]]:
        pairs = [
            _refresh_leaf(
                member, mask, pair, state, method=method, count=count, key=key
            )
            for member, mask, pair, state in zip(members, owed, *old, strict=True)
        ]
        return [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    if when is True:
        return refresh((projectors, refreshes))
    flag = jnp.any(jnp.stack([jnp.any(mask) for mask in owed]))
    flag = flag if when is None else flag & when
    # `lax.cond` makes its second function branch 0: the no-op comes first, which spares
    # copies of the operands on older XLA (jax issue 16661).
    return lax.cond(_any(flag), refresh, lambda old: old, (projectors, refreshes))


def _due(
    member: Member, refresh: Refresh, count: jax.Array, total: int, stagger: bool
) -> jax.Array:
    scheduled = latest_scheduled(
        count, member.matrix.gap, member.ordinals, total, stagger
    )
    return (refresh.last < 0) | (refresh.last < scheduled)


def _refresh_leaf(
    member: Member,
    owed: jax.Array,
    projectors: Projectors,
    refresh: Refresh,
    *,
    method: Subspace,
    count: jax.Array,
    key: jax.Array,
) -> tuple[Projectors, Refresh]:
    matrix = member.matrix
    sharding = explicit_sharding(member.gradient)
    gradient = place(member.gradient, replicated(sharding))
    turns = jnp.argsort(~owed.ravel(), stable=True)  # those due come first
    leaf_key = jax.random.fold_in(jax.random.fold_in(key, count), matrix.position)

    def body(
        turn: jax.Array, state: tuple[Projectors, Refresh]
    ) -> tuple[Projectors, Refresh]:
        projectors, refresh = state
        number = turns[turn]
        index = jnp.unravel_index(number, matrix.batch_shape) if matrix.batch else ()
        proposals = [
            _propose(
                method,
                _matrix_of(matrix, side, gradient, index),
                projector[index].reshape(-1, matrix.rank),
                jax.random.fold_in(jax.random.fold_in(leaf_key, number), place_of_side),
                refresh.last[index] < 0,
            )
            for place_of_side, (side, projector) in enumerate(
                zip(matrix.sides, projectors, strict=True)
            )
        ]
        accepted = jnp.all(jnp.stack([ok for _, ok in proposals]))
        return (
            tuple(
                _store(projector, index, basis, accepted)
                for projector, (basis, _) in zip(projectors, proposals, strict=True)
            ),
            Refresh(
                refresh.last.at[index].set(
                    jnp.where(accepted, count, refresh.last[index])
                ),
                refresh.refused.at[index].add(1 - accepted.astype(jnp.int32)),
            ),
        )

    return lax.fori_loop(0, jnp.sum(owed), body, (projectors, refresh))


def _matrix_of(
    matrix: Matrix, side: Side, gradient: jax.Array, index: tuple[jax.Array, ...]
) -> jax.Array:
    """One matrix of the leaf, (projected side, other side), at least f32."""
    gradient = gradient.astype(accumulation_dtype(gradient))
    for axis, number in sorted(zip(matrix.batch, index, strict=True), reverse=True):
        gradient = lax.dynamic_slice_in_dim(gradient, number, 1, axis)
    moved = gradient.transpose(*matrix.batch, *side.axes, *side.others)
    return moved.reshape(matrix.size(side.axes), -1)


def _propose(
    method: Subspace,
    gradient: jax.Array,
    previous: jax.Array,
    key: jax.Array,
    cold: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """A new basis, and whether it may be used."""
    size = jnp.max(jnp.abs(gradient))
    usable = jnp.isfinite(size) & (size > 0)
    # Dividing first makes the basis independent of the gradient's scale, squares of
    # 1e±30 included, and keeps NaN away from LAPACK.
    unit = jnp.where(usable, gradient / size, 0)
    basis = method.basis(unit, previous.astype(unit.dtype), key, cold)
    if basis.shape != previous.shape:
        raise ValueError(
            f"{method!r} returned a basis of shape {basis.shape} for a gradient of"
            f" shape {gradient.shape}; it must be (m, rank) = {previous.shape}."
        )
    return basis, usable & _sound(method, basis)


def _sound(method: Subspace, basis: jax.Array) -> jax.Array:
    if not method.orthonormal:
        return jnp.all(jnp.isfinite(basis))
    error = matmul(basis.T, basis) - jnp.eye(basis.shape[1], dtype=basis.dtype)
    return jnp.max(jnp.abs(error)) <= ORTHONORMALITY_TOLERANCE  # false for NaN


def _store(
    projector: jax.Array,
    index: tuple[jax.Array, ...],
    basis: jax.Array,
    accepted: jax.Array,
) -> jax.Array:
    old = projector[index]
    new = basis.reshape(old.shape).astype(projector.dtype)
    return projector.at[index].set(jnp.where(accepted, new, old))
