# SPDX-License-Identifier: Apache-2.0
"""Bases found by passes of the loss, where the method needs products alone.

    X = start                      power: the basis in use, with a little noise
    X ← between(right(X G) Gᵀ)     two passes, for all matrices of the tree
    P = finish(X)

No gradient is formed, and a sum over micro-batches inside the loss is exact.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax import _state
from galore_optax._asking.record import Recorded, galore_states, replaced
from galore_optax._projector.groups import groups_of, leaves_of
from galore_optax._projector.refresh import (
    Move,
    When,
    counted,
    joined,
    owed_now,
    rested,
)
from galore_optax._projector.renew import Found, Run, Turn, gathered
from galore_optax._selection.matrices import Matrix
from galore_optax._state import GaLoreState
from galore_optax._transform import mover
from galore_optax._xla.sharding import everywhere, lying_like
from galore_optax.backward.leaves import Weights
from galore_optax.backward.loss import Traced
from galore_optax.backward.passes import products
from galore_optax.backward.search import Columns, Search
from galore_optax.subspace._base import ByProducts


def needs_gradients(records: Sequence[Recorded]) -> list[str]:
    """The methods for which gradients are formed, by what they print as."""
    methods = [record.config.subspace for record in records if record.plan.projected]
    return [repr(x) for x in methods if not isinstance(x, ByProducts)]


def renew_by_passes(
    program: Traced, weights: Weights, state: Any, when: When, shares: int = 1
) -> Any:
    """`state` with new bases for what is due.

    Args:
      program: the loss.
      weights: of it.
      state: of the transformation.
      when: as in `refresh_when_due`.
      shares: leaves are divided into as many, renewed one after another.
    """
    olds = galore_states(weights.records, state)
    parts = [
        _part(weights, record, old, when, shares)
        for record, old in zip(weights.records, olds, strict=True)
        if record.plan.projected
    ]
    searches = [search for part in parts for search in part.searches]
    found = iter(_renewed(program, weights, searches))
    for part in parts:
        state = replaced(state, part.old, part.new(found))
    return state


def _renewed(program: Traced, weights: Weights, searches: list[Search]) -> list[Found]:
    """For each search what it finds, by one share of them after another."""
    found: dict[int, Found] = {}
    for share in sorted({search.share for search in searches}):
        numbers = [i for i, search in enumerate(searches) if search.share == share]
        # Or vectors of one share would be held beside those of the next.
        done = [accepted for _, accepted in found.values()]
        values, _ = lax.optimization_barrier((weights.values, done))
        now = dataclasses.replace(weights, values=values)
        ends = _found(program, now, [searches[i] for i in numbers])
        for number, end in zip(numbers, ends, strict=True):
            found[number] = searches[number].finish(end)
    return [found[number] for number in range(len(searches))]


def shares_of(matrices: Sequence[Matrix], count: int) -> list[list[int]]:
    """Positions of leaves in at most `count` shares of about the same size."""
    shares: list[list[int]] = [[] for _ in range(min(count, len(matrices)))]

    def held(position: int) -> int:
        """Entries of the vectors on both sides of a leaf's matrices."""
        matrix = matrices[position]
        sides = matrix.size(matrix.rows) + matrix.size(matrix.cols)
        return matrix.count * matrix.rank * sides

    for position in sorted(range(len(matrices)), key=held, reverse=True):
        min(shares, key=lambda share: sum(map(held, share))).append(position)
    return [sorted(share) for share in shares]


class _Part(NamedTuple):
    """One `galore` inside the transformation."""

    record: Recorded
    old: GaLoreState
    counters: tuple[jax.Array, jax.Array]  # joined, last and refused
    owed: Any
    searches: list[Search]
    move: Move

    def new(self, found: Iterator[Found]) -> GaLoreState:
        """From what is next in `found`."""
        plan, old = self.record.plan, self.old
        results = [next(found) for _ in self.searches]
        groups = [search.group for search in self.searches]
        projectors, accepted = gathered(groups, results)
        before = _state.read(plan, old)
        projectors = lying_like(projectors, before)
        bases, rule = (before, projectors), self.record.config.refresh
        rest = rested(plan, rule, old.refresh, bases, accepted)
        refresh = counted(plan, self.counters, self.owed, accepted, old.count, rest)
        nodes = plan.arrange(map(_state.as_node, projectors))
        moved = self.move(before, projectors, accepted, old.inner_state)
        return old._replace(projector=nodes, refresh=refresh, inner_state=moved)


def _part(
    weights: Weights, record: Recorded, old: GaLoreState, when: When, shares: int
) -> _Part:
    plan, method = record.plan, cast(ByProducts, record.config.subspace)
    owed = owed_now(plan, record.config.stagger, old.refresh, old.count, when)
    last, refused = (
        joined(plan, counters) for counters in (old.refresh.last, old.refresh.refused)
    )
    turn = Turn(owed, owed, last < 0, plan.names)
    run = Run(method, old.key, old.count, record.config.moments.align_signs)
    places = [weights.paths.index(matrix.path) for matrix in plan.projected]
    values = [weights.values[place] for place in places]
    leaves = leaves_of(plan.projected, values, everywhere(_state.read(plan, old)))

    def searches(share: int, positions: list[int]) -> Iterator[Search]:
        for group in groups_of([leaves[i] for i in positions], several=True):
            at = [positions[i] for i in group.positions]
            where = tuple(places[position] for position in at)
            group = dataclasses.replace(group, positions=at)
            yield Search(group, where, turn.at(group.entries), run, method, share)

    found = itertools.starmap(searches, enumerate(shares_of(plan.projected, shares)))
    return _Part(
        record,
        old,
        (last, refused),
        owed,
        list(itertools.chain(*found)),
        mover(plan, record.config, record.inner, old.count),
    )


def _found(
    program: Traced, weights: Weights, searches: list[Search]
) -> list[tuple[Columns, ...]]:
    """For each search, what every side of it ends with."""
    found: list[tuple[Columns, ...]] = [() for _ in searches]
    for side in range(max(search.sides for search in searches)):
        numbers = [i for i, search in enumerate(searches) if side < search.sides]
        rows = _one_side(program, weights, [searches[i] for i in numbers], side)
        for number, x in zip(numbers, rows, strict=True):
            found[number] = (*found[number], x)
    return found


def _one_side(
    program: Traced, weights: Weights, searches: list[Search], side: int
) -> list[Columns]:
    found = [search.start(side) for search in searches]
    numbers = [i for i, search in enumerate(searches) if search.needs_gradient]
    if not numbers:
        return found
    searches = [searches[i] for i in numbers]

    def turn(number: Any, old: list[Columns]) -> list[Columns]:
        pairs = list(zip(searches, old, strict=True))
        found = [search.by_leaf(x.columns) for search, x in pairs]
        found = _pass(program, weights, searches, side, found, opposite=False)
        found = [x.right(number, y) for x, y in zip(searches, found, strict=True)]
        found = _pass(program, weights, searches, side, found, opposite=True)
        return [
            search.after(number, x, y)
            for (search, y), x in zip(pairs, found, strict=True)
        ]

    turns = jnp.max(jnp.stack([search.turns for search in searches]))
    ends = lax.fori_loop(0, turns, turn, [found[i] for i in numbers])
    for number, end in zip(numbers, ends, strict=True):
        found[number] = end
    return found


def _pass(
    program: Traced,
    weights: Weights,
    searches: list[Search],
    side: int,
    columns: list[list[Any]],
    *,
    opposite: bool,
) -> list[list[Any]]:
    """The product of each leaf of each search, all in one pass."""
    factors = [search.factors(side, opposite=opposite) for search in searches]
    flat, structure = jax.tree.flatten(columns)
    made = products(program, weights.values, list(itertools.chain(*factors)), flat)
    return jax.tree.unflatten(structure, made)
