# SPDX-License-Identifier: Apache-2.0
"""When refreshes happen, asked on the host."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from galore_optax._asking.record import Recorded, galore_states, plans_of
from galore_optax._projector.refresh import Calendar, calendar, joined, rest_of
from galore_optax._selection.matrices import Plan
from galore_optax._state import GaLoreState

# Steps after a scheduled one at which a refused basis may be tried again: gradients are
# zero at first behind projections that begin as zeros, and not finite while the scale
# of a 16-bit loss is being found.
RETRIES = 8


@dataclasses.dataclass(frozen=True)
class RefreshSchedule:
    """When a transformation refreshes something."""

    _records: tuple[Recorded, ...]
    _calendars: tuple[Calendar, ...]  # one a record, NumPy arrays

    def due(self, step: int) -> bool:
        """Whether any matrix may have to be refreshed at `step`, counted from 0.

        True where a refresh is scheduled, and at the eight steps that follow, because a
        matrix whose new basis was refused (its gradient was zero or not finite) is due
        again: the program with refresh code decides what to do, and does nothing where
        nothing is owed. Only a matrix that is refused nine times in a row waits for the
        next scheduled step, unless `owed` is asked.
        """
        return step <= RETRIES or any(
            bool(np.any(step - times.latest(step) <= RETRIES))
            for times in self._calendars
        )

    def owed(self, state: Any) -> bool:
        """Whether the next update would refresh anything, refused bases included.

        Reads counters from the device, and so waits for the step that writes them.
        """
        states = galore_states(self._records, state)
        plans = (record.plan for record in self._records)
        return any(
            bool(np.any(_owed(plan, times, found)))
            for plan, times, found in zip(plans, self._calendars, states, strict=True)
        )


def refresh_schedule(tx: optax.GradientTransformation, params: Any) -> RefreshSchedule:
    """When `tx` refreshes its projectors, for programs that decide on the host.

    Two compiled steps, one without any refresh code, replace the conditional:
    `step = refreshing if schedule.due(i) else steady`, where `refreshing` calls
    `tx.update(...)` and `steady` calls `tx.update(..., refresh=False)`.

    Args:
      tx: a transformation that contains `galore`, however wrapped.
      params: the parameters it trains, or their shapes.

    Returns:
      a schedule with `due(step)`, arithmetic alone, and `owed(state)`.

    Raises:
      ValueError: `tx` contains no `galore`, or `update_proj_gap` is traced.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> tx = galore_optax.galore(optax.adam(1e-3), rank=4, update_proj_gap=50)
      >>> params = {"w": jnp.ones((16, 32))}
      >>> schedule = galore_optax.refresh_schedule(tx, params)
      >>> [schedule.due(step) for step in (0, 8, 9, 49, 50, 58, 59)]
      [True, True, False, False, True, True, False]
      >>> schedule.owed(tx.init(params))
      True
    """
    records, _ = plans_of(tx, params)
    for record in records:
        for matrix in record.plan.projected:
            if isinstance(matrix.gap, jax.core.Tracer):
                raise ValueError(
                    f"update_proj_gap of '{matrix.path}' is traced, so its schedule is"
                    " unknown to the host. Add 'update_proj_gap' to the static_args of"
                    " optax.inject_hyperparams."
                )
    return RefreshSchedule(records, tuple(map(_on_the_host, records)))


def _owed(plan: Plan, times: Calendar, state: GaLoreState) -> Any:
    last, rest = joined(plan, state.refresh.last), rest_of(plan, state.refresh)
    return times.owed(last, int(state.count), rest)


def _on_the_host(record: Recorded) -> Calendar:
    times = calendar(record.plan, record.config.stagger)
    return Calendar(np.asarray(times.gaps), np.asarray(times.shifts))
