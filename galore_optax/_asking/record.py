# SPDX-License-Identifier: Apache-2.0
"""Asks a transformation, however wrapped, about the `galore` parts inside it."""

from typing import Any, NamedTuple

import jax
import optax

from galore_optax._config import Config
from galore_optax._context import current, within
from galore_optax._inner.params_use import ParamsUse
from galore_optax._selection.leaves import check_arrays, is_masked
from galore_optax._selection.matrices import Plan
from galore_optax._state import GaLoreState


class Recorded(NamedTuple):
    """One `galore` inside a transformation."""

    plan: Plan  # with shapes in place of values
    config: Config
    use: ParamsUse | None  # of the inner; `None` where it needs extra arguments
    inner: optax.GradientTransformation


def record(
    plan: Plan,
    config: Config,
    use: ParamsUse | None,
    inner: optax.GradientTransformation,
) -> bool:
    """Called by `init`; whether somebody asks, inside `plans_of`."""
    records = current().records
    if records is not None:
        records.append(Recorded(plan.abstract(), config, use, inner))
    return records is not None


def record_updates(updates: Any) -> bool:
    """Called by `update`; whether these updates were asked for, and nothing else."""
    found = current().updates
    if found is not None:
        found.append(updates)
    return found is not None


def updates_that_reach(
    tx: optax.GradientTransformation, updates: Any, state: Any, params: Any
) -> list[Any]:
    """What each `galore` inside `tx` is given for coordinates `updates`; to trace."""
    found: list[Any] = []
    with within(updates=found):
        tx.update(updates, state, params, projected=True)
    return found


def plans_of(
    tx: optax.GradientTransformation, params: Any
) -> tuple[tuple[Recorded, ...], Any]:
    """What every `galore` inside `tx` projects, and the abstract state of `tx`.

    Raises:
      TypeError: a leaf of `params` is no array.
      ValueError: there is none.
    """
    records, state = heard(tx, params)
    if not records:
        raise ValueError(
            "this transformation contains no galore. Pass the one that is given to"
            " init, such as galore_optax.galore(optax.adam(1e-3), rank=128)."
        )
    return records, state


def heard(
    tx: optax.GradientTransformation, params: Any
) -> tuple[tuple[Recorded, ...], Any]:
    """As `plans_of`, but there may be none."""
    check_arrays(params)  # JAX would refuse them without a remedy
    records: list[Recorded] = []
    with within(records=records):
        # A new function each time: JAX would remember the shapes, and trace no more.
        state = jax.eval_shape(lambda tree: tx.init(tree), params)
    return tuple(records), state


def galore_states(records: tuple[Recorded, ...], state: Any) -> list[GaLoreState]:
    """The part of `state` that belongs to each record.

    Raises:
      ValueError: `state` holds none for some record.
    """
    nodes = jax.tree.leaves(state, is_leaf=is_state)
    states = [node for node in nodes if is_state(node)]
    return [_state_of(record.plan, states) for record in records]


def is_state(node: Any) -> bool:
    return isinstance(node, GaLoreState)


def replaced(state: Any, old: GaLoreState, new: GaLoreState) -> Any:
    """`state` with `new` for its part `old`."""
    return jax.tree.map(lambda x: new if x is old else x, state, is_leaf=is_state)


def _state_of(plan: Plan, states: list[GaLoreState]) -> GaLoreState:
    for state in states:
        if _fits(plan, state):
            return state
    raise ValueError(
        "the state holds no GaLoreState for the leaves"
        f" {[matrix.path for matrix in plan.projected]}. Pass the state that this"
        " transformation's init made for these parameters."
    )


def _fits(plan: Plan, state: GaLoreState) -> bool:
    try:
        nodes = plan.flat.subtrees(state.projector)
    except (ValueError, TypeError):
        return False
    return [is_masked(node) for node in nodes] == plan.is_full
