# SPDX-License-Identifier: Apache-2.0
"""Gradient accumulation that refreshes once a step, not once a micro-step.

MultiSteps            gradients, (m, n); bases from their mean
ProjectedMultiSteps   coordinates, (rank, n); bases from the first micro-batch
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax._projector.coordinates import project_gradients
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
        _check(opt, type(self).__name__)
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
        refresh = _only(self._is_last(state), refresh)
        return super().update(updates, state, params, refresh=refresh, **extra_args)

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        return optax.GradientTransformationExtraArgs(self.init, self.update)

    def _is_last(self, state: Any) -> Any:
        steps = self._micro_steps
        number = steps(state.gradient_step) if callable(steps) else steps
        return state.mini_step == number - 1


class ProjectedMultiSteps:
    r"""`optax.MultiSteps` of coordinates: (rank, n) of a gradient are kept, not (m, n).

    .. math:: R = \frac{1}{k} \sum_i P^T G_i

    The first micro-step of a step renews the bases that are due, all project on them.
    Takes gradients, or coordinates: those of `value_and_projected_grad`, by
    `update_projected`.

    Args:
      opt: the transformation; `galore` anywhere inside it.
      every_k_schedule: micro-steps a step, or a callable of the step.
      **kwargs: of `optax.MultiSteps`.

    Raises:
      ValueError: on `update`: what comes before `galore` in `opt` is not linear.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> tx = galore_optax.ProjectedMultiSteps(
      ...     galore_optax.galore(optax.adam(1e-3), rank=4), every_k_schedule=2)
      >>> params = {"w": jnp.ones((16, 32))}
      >>> state = tx.init(params)
      >>> state.acc_grads["w"].shape
      (4, 32)
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
        _check(opt, type(self).__name__)
        self._opt = opt
        self._around = lambda tx: optax.MultiSteps(tx, every_k_schedule, **kwargs)
        self._multi = self._around(opt)

    def init(self, params: Any) -> optax.MultiStepsState:
        """Of `opt`, beside zeros of the coordinates' shapes."""
        inner = self._opt.init(params)

        def coordinates(inner: Any, params: Any) -> Any:
            return project_gradients(self._opt, params, inner, params, refresh=False)[0]

        shapes = jax.eval_shape(coordinates, inner, params)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        made = optax.GradientTransformation(lambda _: inner, self._opt.update)
        return self._around(made).init(zeros)

    def update(
        self,
        updates: Any,
        state: optax.MultiStepsState,
        params: Any = None,
        *,
        refresh: When = None,
        projected: bool = False,
        **extra_args: Any,
    ) -> tuple[Any, optax.MultiStepsState]:
        """As `optax.MultiSteps.update`; the first micro-step alone may refresh."""
        if not projected:
            refresh = _only(state.mini_step == 0, refresh)
            updates, inner = project_gradients(
                self._opt, updates, state.inner_opt_state, params, refresh=refresh
            )
            state = state._replace(inner_opt_state=inner)
        return self._multi.update(updates, state, params, projected=True, **extra_args)

    def gradient_transformation(self) -> optax.GradientTransformationExtraArgs:
        return optax.GradientTransformationExtraArgs(self.init, self.update)


def _check(opt: Any, name: str) -> None:
    if not (hasattr(opt, "init") and hasattr(opt, "update")):
        raise TypeError(
            f"opt={opt!r} is no optax.GradientTransformation. Write"
            f" {name}(tx, every_k_schedule=4)."
        )


def _only(now: Any, refresh: When) -> When:
    """`refresh`, and nothing but where it is the micro-step for it."""
    if refresh is False:
        return False
    return now if refresh is None else jnp.logical_and(now, refresh)
