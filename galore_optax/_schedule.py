# SPDX-License-Identifier: Apache-2.0
"""When refreshes happen, asked on the host."""

import dataclasses
from typing import Any

import jax
import numpy as np
import optax

from galore_optax._record import Recorded, galore_states, plans_of
from galore_optax._refresh import Calendar, calendar


@dataclasses.dataclass(frozen=True)
class RefreshSchedule:
    """When a transformation refreshes something."""

    _records: tuple[Recorded, ...]

    def due(self, step: int) -> bool:
        """Whether any matrix is scheduled for a refresh at `step`, counted from 0.

        Knows nothing of refused bases, which are due again at the next step; `owed`
        does.
        """
        return step == 0 or any(
            bool(np.any(_calendar(record).latest(step) == step))
            for record in self._records
        )

    def owed(self, state: Any) -> bool:
        """Whether the next update would refresh anything, refused bases included.

        Reads counters from the device, and so waits for the step that writes them.
        """
        states = galore_states(self._records, state)
        return any(
            bool(np.any(_calendar(record).owed(found.refresh, int(found.count))))
            for record, found in zip(self._records, states, strict=True)
        )


def _calendar(record: Recorded) -> Calendar:
    return calendar(record.plan, record.config.stagger)


def refresh_schedule(tx: optax.GradientTransformation, params: Any) -> RefreshSchedule:
    """When `tx` refreshes its projectors, for programs that decide on the host.

    Two compiled steps, one without any refresh code, replace the conditional:
    `step = refreshing if schedule.due(i) else steady`.

    Args:
      tx: a transformation that contains `galore`, however wrapped.
      params: the parameters it trains, or their shapes.

    Returns:
      a schedule with `due(step)`, arithmetic alone, and `owed(state)`.

    Raises:
      ValueError: `tx` contains no `galore`, or `update_proj_gap` is traced.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> tx = galore_optax.galore(optax.adam(1e-3), rank=4, update_proj_gap=10)
      >>> params = {"w": jnp.ones((16, 32))}
      >>> schedule = galore_optax.refresh_schedule(tx, params)
      >>> [step for step in range(30) if schedule.due(step)]
      [0, 10, 20]
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
    return RefreshSchedule(records)
