# SPDX-License-Identifier: Apache-2.0
"""When a subspace is refreshed.

All matrices of a tree share one loop of one turn or none, so that a step on which
nothing is due costs one host round trip at most.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from galore_optax._projector.groups import leaves_of, parts
from galore_optax._projector.owners import owners_of
from galore_optax._projector.project import overlap
from galore_optax._projector.renew import Run, Turn, renew_leaves
from galore_optax._selection.matrices import Plan
from galore_optax._storage.projectors import Projectors
from galore_optax._xla.order import Tree
from galore_optax._xla.sharding import everywhere, lying_like, varies_over
from galore_optax.refresh import RefreshRule
from galore_optax.subspace import Subspace

When: TypeAlias = bool | jax.Array | None
_Renewed: TypeAlias = tuple[list[Projectors], "Refresh", Any]
# (old projectors, new ones, accepted, moments) -> moments in the new bases
Move: TypeAlias = Callable[
    [Sequence[Projectors], Sequence[Projectors], jax.Array, Any], Any
]


class Refresh(NamedTuple):
    """What each matrix needs to know about its own refreshing.

    Trees like params: an array of the batch axes of each projected leaf.
    """

    last: Any  # int32: count at its last refresh, -1 before any
    refused: Any  # int32: new bases that failed the check
    rest: Any = ()  # int32: gaps until the next refresh, where a rule decides


def initial_refresh(plan: Plan, rule: RefreshRule | None) -> Refresh:
    def counters(start: int) -> Any:
        shapes = (matrix.batch_shape for matrix in plan.projected)
        return plan.arrange(jnp.full(shape, start, jnp.int32) for shape in shapes)

    return Refresh(counters(-1), counters(0), counters(1) if rule else ())


def joined(plan: Plan, counters: Any) -> jax.Array:
    """(matrices,): counters of each leaf, leaf by leaf and row-major in each."""
    return _joined(plan.read(counters))


# Compiled by itself so that what is asked for several times is traced once.
@functools.partial(jax.jit, inline=True)
def _joined(counters: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([x.reshape(-1) for x in counters])


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

    def owed(self, last: Any, count: Any, rest: Any = None) -> Any:
        """Whether a refresh is outstanding: never done, or older than the schedule.

        With `rest`, older than so many gaps of it.
        """
        latest = self.latest(count)
        if rest is None:
            return (last < 0) | (last < latest)
        return (last < 0) | (latest - self.latest(last) >= self.gaps * rest)


def calendar(plan: Plan, stagger: bool) -> Calendar:
    """Multiples of each gap; with `stagger`, shifted by an even share of it."""
    matrices, counts = plan.projected, plan.counts
    gaps: Any
    if any(isinstance(matrix.gap, jax.Array) for matrix in matrices):
        gaps = jnp.stack([jnp.asarray(m.gap, jnp.int32) for m in matrices])
        gaps = jnp.repeat(gaps, np.array(counts), total_repeat_length=sum(counts))
    else:
        gaps = np.repeat([matrix.gap for matrix in matrices], counts).astype(np.int32)
    return Calendar(gaps, _share(gaps, *plan.numbering) if stagger else 0 * gaps)


def _share(gap: Any, number: Any, total: int) -> Any:
    """`gap * number // total`, in which no product leaves the range of int32."""
    return gap // total * number + gap % total * number // total


@jax.custom_batching.custom_vmap
def any_lane(flags: jax.Array) -> jax.Array:
    """`flags`, joined by `or` over every axis that `jax.vmap` adds.

    A batched predicate would turn the conditional into a select that runs both branches
    on every step, and a batched loop counter every slice into a gather.
    """
    return flags


@any_lane.def_vmap
def _any_of_lanes(
    axis_size: int, in_batched: list[bool], flags: jax.Array
) -> tuple[jax.Array, bool]:
    del axis_size, in_batched
    return any_lane(jnp.any(flags, axis=0)), False


def refresh_when_due(
    plan: Plan,
    gradients: Sequence[jax.Array],
    projectors: list[Projectors],
    refresh: Refresh,
    *,
    method: Subspace,
    stagger: bool,
    rule: RefreshRule | None,
    align_signs: bool,
    count: jax.Array,
    key: jax.Array,
    when: When,
    move: Move,
    moments: Any,
    axis_name: Any = None,
) -> tuple[list[Projectors], Refresh, Any]:
    """New projectors for every matrix that is due, the old ones for the rest.

    Args:
      plan: what is projected.
      gradients: of the projected leaves, full size.
      projectors: theirs.
      refresh: of all their matrices.
      method: finds the bases.
      stagger: spread refreshes over the gap.
      rule: how long bases are kept, if not one gap.
      align_signs: of new columns with the old ones.
      count: step, int32 scalar.
      key: raw PRNG key of the whole run.
      when: `None`, what is due; `False`, nothing; `True`, everything; a traced bool,
        what is due if it holds.
      move: what becomes of moments.
      moments: the state of the inner, or nothing.
      axis_name: mesh axes over whose devices gradients are averaged first, where
        anything is due.

    Returns:
      projectors, refresh and moments.

    Raises:
      ValueError: bases would differ from device to device.
    """
    if when is False or not plan.projected:
        return projectors, refresh, moments
    if axis_name is None:
        _refuse_local(plan, gradients, projectors)
    # Bases are constants of a step: what differentiates through it differentiates the
    # products with them. Loops whose length depends on values have no reverse mode.
    gradients, projectors, moments = lax.stop_gradient((gradients, projectors, moments))
    owed = owed_now(plan, stagger, refresh, count, when)
    inputs = _Inputs(gradients, any_lane(owed), owed, key, count)
    how = _How(method, not stagger, rule, align_signs, move, axis_name)
    renew = functools.partial(_renew, plan, how)
    if when is True:
        return renew(inputs, (projectors, refresh, moments))

    def turn(_: Any, old: _Renewed) -> _Renewed:
        return renew(*_in_loop(inputs, old, axis_name is not None))

    # Its carry is updated in place: a conditional would copy all projectors.
    turns = jnp.any(inputs.lanes).astype(jnp.int32)
    return lax.fori_loop(0, turns, turn, (projectors, refresh, moments))


def _refuse_local(
    plan: Plan, gradients: Sequence[jax.Array], projectors: Sequence[Projectors]
) -> None:
    """Raises where devices of a `shard_map` have other gradients, but one basis."""
    leaves = zip(plan.projected, gradients, projectors, strict=True)
    for matrix, gradient, arrays in leaves:
        over = varies_over(gradient).difference(
            *map(varies_over, jax.tree.leaves(arrays))
        )
        if over:
            axes = ", ".join(repr(name) for name in sorted(over))
            raise ValueError(
                f"the gradient of '{matrix.path}' differs over the mesh axes {axes},"
                " and so would its new basis, which all devices are to share. Average"
                f" gradients first, jax.lax.pmean(gradients, {axes}), or coordinates,"
                " which are smaller: galore_optax.project_gradients(...,"
                f" axis_name={axes})."
            )


def owed_now(
    plan: Plan, stagger: bool, refresh: Refresh, count: jax.Array, when: When
) -> jax.Array:
    """(matrices,): whether each is to be renewed now."""
    last, rest = joined(plan, refresh.last), rest_of(plan, refresh)
    owed = calendar(plan, stagger).owed(last, count, rest)
    if when is True:
        return jnp.ones_like(owed)
    return owed if when is None else owed & when


class _How(NamedTuple):
    """What is static of a refresh."""

    method: Subspace
    together: bool  # matrices become due together
    rule: RefreshRule | None
    align_signs: bool
    move: Move
    axis_name: Any


class _Inputs(NamedTuple):
    """All that a refresh is made from, but for what it renews."""

    gradients: Sequence[jax.Array]
    lanes: jax.Array  # matrices that are due in any lane of a vmap
    owed: jax.Array  # and in this one
    key: jax.Array
    count: jax.Array  # type: ignore[assignment]


def _in_loop(inputs: _Inputs, old: _Renewed, local: bool) -> tuple[_Inputs, _Renewed]:
    """Both as they are; of `inputs` nothing is computed before the loop, due or not."""
    if not local:
        return lax.optimization_barrier((inputs, old))
    # By themselves, or all would differ from device to device as gradients do.
    gradients, _ = lax.optimization_barrier((inputs.gradients, old))
    others, old = lax.optimization_barrier((inputs._replace(gradients=()), old))
    return others._replace(gradients=gradients), old


def _renew(plan: Plan, how: _How, inputs: _Inputs, old: _Renewed) -> _Renewed:
    projectors, refresh, moments = old
    gradients, lanes, owed, key, count = inputs
    if how.axis_name is not None:
        gradients = [lax.pmean(x, how.axis_name) for x in gradients]
    counters = joined(plan, refresh.last), joined(plan, refresh.refused)
    last, _ = counters
    turn = Turn(lanes, owed, last < 0, plan.names)
    run = Run(how.method, key, count, how.align_signs)
    owners = owners_of(plan, gradients, projectors)
    if owners and (how.together or owners.spare_gathers):
        found, accepted = owners.renew(gradients, turn, run, together=how.together)
    else:
        leaves = leaves_of(plan.projected, gradients, everywhere(projectors))
        found, accepted = renew_leaves(leaves, turn, run, together=how.together)
    found = lying_like(found, projectors)
    moments = how.move(projectors, found, accepted, moments)
    rest = rested(plan, how.rule, refresh, (projectors, found), accepted)
    return found, counted(plan, counters, owed, accepted, count, rest), moments


def counted(
    plan: Plan,
    counters: tuple[jax.Array, jax.Array],
    owed: jax.Array,
    accepted: jax.Array,
    count: jax.Array,
    rest: Any,
) -> Refresh:
    """The counters, `joined` so far, after step `count`, when those owed were tried."""
    last = jnp.where(accepted, count, counters[0])
    refused = counters[1] + (owed & ~accepted).astype(jnp.int32)
    lasts, refusals = zip(*by_leaf(plan, (last, refused), count), strict=True)
    return Refresh(plan.arrange(lasts), plan.arrange(refusals), rest)


def rest_of(plan: Plan, refresh: Refresh) -> jax.Array | None:
    """(matrices,): gaps that each keeps its basis; `None` where no rule decides."""
    return joined(plan, refresh.rest) if jax.tree.leaves(refresh.rest) else None


def rested(
    plan: Plan,
    rule: RefreshRule | None,
    refresh: Refresh,
    bases: tuple[Sequence[Projectors], Sequence[Projectors]],
    accepted: jax.Array,
) -> Any:
    """`refresh.rest`, decided anew where one of the new `bases` was accepted."""
    if rule is None:
        return refresh.rest
    before = rest_of(plan, refresh)
    if before is None:
        raise ValueError(
            f"the state of galore was made without refresh={rule!r}. Restore it with"
            " the rule it was saved with, or begin anew with tx.init(params)."
        )
    pairs = zip(plan.projected, *bases, strict=True)
    found = [jnp.ravel(overlap(matrix, new, old)) for matrix, old, new in pairs]
    rest = rule.rest(jnp.concatenate(found), before)
    # The first basis of all is not compared with a slice of the identity.
    rest = jnp.where(joined(plan, refresh.last) < 0, 1, rest)
    rest = jnp.where(accepted, rest, before)
    return plan.arrange(by_leaf(plan, rest, before[0]))


def by_leaf(plan: Plan, entries: Tree, step: jax.Array) -> list[Tree]:
    """What is known of every matrix, in the batch axes of each projected leaf."""
    shapes = [matrix.batch_shape for matrix in plan.projected]
    return parts(entries, plan.counts, shapes, step)
