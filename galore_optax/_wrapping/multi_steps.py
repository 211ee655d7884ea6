# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation that refreshes once a step, not once a micro-step."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from galore_optax._projector.refresh import When


class MultiSteps(optax.MultiSteps):
    """`optax.MultiSteps`, for a transformation that contains `galore`.

    `optax.MultiSteps` runs the whole optimizer at every micro-step and throws the
    result away until the last one. That is correct around `galore`, but a refresh that
    is due then runs once for each micro-step. Here it runs on the last alone, from the
    mean gradient.

    Args:
      opt: the transformation; `galore` anywhere inside it.
      every_k_schedule: micro-steps a step, or a callable of the step.
      **kwargs: of `optax.MultiSteps`.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> tx = galore_optax.MultiSteps(
      ...     galore_optax.galore(optax.adam(1e-3), rank=4), every_k_schedule=2)
      >>> params = {"w": jnp.ones((16, 32))}
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update({"w": jnp.ones((16, 32))}, state, params)
      >>> int(state.gradient_step)
      1
    """

    def __init__(
        self,
        opt: optax.GradientTransformation,
        every_k_schedule: int | Callable[[Any], Any],
        **kwargs: Any,
    ) -> None:
        super().__init__(opt, every_k_schedule, **kwargs)
        self._micro_steps = every_k_schedule

    def update(
        self,
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        refresh: When = None,
        **extra_args: Any,
    ) -> tuple[Any, Any]:
        """As `optax.MultiSteps.update`; only the last micro-step may refresh."""
        if refresh is not False:
            last = self._is_last(state)
            refresh = last if refresh is None else jnp.logical_and(last, refresh)
        return super().update(updates, state, params, refresh=refresh, **extra_args)

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        return optax.GradientTransformationExtraArgs(self.init, self.update)

    def _is_last(self, state: Any) -> Any:
        steps = self._micro_steps
        number = steps(state.gradient_step) if callable(steps) else steps
        return state.mini_step == number - 1
