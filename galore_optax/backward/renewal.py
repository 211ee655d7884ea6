# SPDX-License-Identifier: Apache-2.0
"""Bases found by passes of the loss, where the method needs products alone.

    X = start                      power: the basis in use, with a little noise
    X ← between(right(X G) Gᵀ)     two passes, for all matrices of the tree
    P = finish(X)

No gradient is formed, and a sum over micro-batches inside the loss is exact.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax import _state
from galore_optax._asking.record import Recorded, galore_states, replaced
from galore_optax._projector.groups import groups_of, leaves_of
from galore_optax._projector.refresh import When, counted, joined, owed_now
from galore_optax._projector.renew import Run, Turn, gathered
from galore_optax._state import GaLoreState
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


def renew_by_passes(program: Traced, weights: Weights, state: Any, when: When) -> Any:
    """`state` with new bases for what is due; `when` as in `refresh_when_due`."""
    olds = galore_states(weights.records, state)
    parts = [
        _part(weights, record, old, when)
        for record, old in zip(weights.records, olds, strict=True)
        if record.plan.projected
    ]
    searches = [search for part in parts for search in part.searches]
    found = iter(_found(program, weights, searches))
    for part in parts:
        state = replaced(state, part.old, part.new(found))
    return state


class _Part(NamedTuple):
    """One `galore` inside the transformation."""

    record: Recorded
    old: GaLoreState
    counters: tuple[jax.Array, jax.Array]  # joined, last and refused
    owed: Any
    searches: list[Search]

    def new(self, found: Iterator[tuple[Columns, ...]]) -> GaLoreState:
        """From what is next in `found`."""
        plan, old = self.record.plan, self.old
        results = [search.finish(next(found)) for search in self.searches]
        groups = [search.group for search in self.searches]
        projectors, accepted = gathered(groups, results)
        projectors = lying_like(projectors, _state.read(plan, old))
        refresh = counted(plan, self.counters, self.owed, accepted, old.count)
        nodes = plan.arrange(map(_state.as_node, projectors))
        return old._replace(projector=nodes, refresh=refresh)


def _part(weights: Weights, record: Recorded, old: GaLoreState, when: When) -> _Part:
    plan, method = record.plan, cast(ByProducts, record.config.subspace)
    owed = owed_now(plan, record.config.stagger, old.refresh, old.count, when)
    last, refused = (joined(plan, counters) for counters in old.refresh)
    turn = Turn(owed, owed, last < 0, plan.names)
    run = Run(method, old.key, old.count)
    places = [weights.paths.index(matrix.path) for matrix in plan.projected]
    values = [weights.values[place] for place in places]
    leaves = leaves_of(plan.projected, values, everywhere(_state.read(plan, old)))
    searches = [
        Search(
            group,
            tuple(places[position] for position in group.positions),
            turn.at(group.entries),
            run,
            method,
        )
        for group in groups_of(leaves, several=True)
    ]
    return _Part(record, old, (last, refused), owed, searches)


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
