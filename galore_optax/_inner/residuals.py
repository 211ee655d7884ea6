# SPDX-License-Identifier: Apache-2.0
"""What updates take from gradients outside of the subspace, leaf by leaf."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax._inner.params_use import Decay
from galore_optax._inner.run import Decays, Frame, decay_of
from galore_optax._projector.project import accumulation_dtype, turned
from galore_optax._selection.matrices import Matrix, Plan
from galore_optax._storage.projectors import Projectors
from galore_optax._xla.sharding import (
    explicit_sharding,
    letter_sharding,
    lying_like,
    place,
)
from galore_optax.residual import Residual, Step


def initial_norms(plan: Plan, residual: Residual | None) -> Any:
    if residual is None:
        return ()
    shapes = (matrix.batch_shape for matrix in plan.projected)
    return plan.arrange(jnp.zeros(shape, jnp.float32) for shape in shapes)


class Residuals(NamedTuple):
    """What is added to the updates of one step, or takes their place."""

    directions: list[jax.Array]  # of the inner, with the part inside the subspace
    columns: dict[int, jax.Array]  # by position: what gradients are multiplied by
    norms: Any  # to remember
    instead: bool = False

    def lifted(
        self, frame: Frame, params: Sequence[jax.Array], decay: Decays
    ) -> list[jax.Array]:
        """The updates of all leaves; arguments as in `Frame.lift`."""
        if not self.instead:
            return self._added(frame, frame.lift(self.directions, params, decay))
        alone = list(self.directions)
        for at in self.columns:
            alone[at] = _decay_alone(params[at], decay.get(at))
        return self._added(frame, alone)

    def _added(self, frame: Frame, lifted: Sequence[jax.Array]) -> list[jax.Array]:
        """`lifted` with the part that is made of the gradients."""
        result = list(lifted)
        for at, columns in self.columns.items():
            more = frame.plan.flat.values[at].astype(columns.dtype) * columns
            result[at] = result[at] + more.astype(result[at].dtype)
        return result


def residuals(
    residual: Residual,
    frame: Frame,
    coordinates: Sequence[jax.Array],
    directions: Sequence[jax.Array],
    norms: Any,
) -> Residuals:
    """What `residual` adds.

    Args:
      residual: the rule.
      frame: whose plan holds the gradients.
      coordinates: of the gradients, one a leaf.
      directions: of the inner, likewise.
      norms: those that `residual` remembers.

    Raises:
      ValueError: the state was made without a residual.
    """
    result, columns, remembered = list(directions), {}, []
    for (matrix, projectors), norm in zip(
        frame.pairs(), _read(frame.plan, norms), strict=True
    ):
        at = matrix.position
        gradient = frame.plan.flat.values[at]
        step = _step(matrix, projectors, gradient, coordinates[at], directions[at])
        added, norm = residual.of(step, norm)
        # One product lifts both; what is inside is not to be scaled.
        if added.coordinates is not None:
            inside = added.coordinates / jnp.asarray(matrix.scale, step.direction.dtype)
            whole = (step.direction + inside).astype(directions[at].dtype)
            result[at] = lying_like(whole, directions[at])
        columns[at] = added.columns
        remembered.append(norm)
    norms = frame.plan.arrange(remembered)
    return Residuals(result, columns, norms, residual.instead)


def _decay_alone(weight: jax.Array, decay: Decay | None) -> jax.Array:
    array = None if decay is None else decay_of(weight, decay)
    return jnp.zeros_like(weight) if array is None else array.astype(weight.dtype)


def _read(plan: Plan, norms: Any) -> list[jax.Array]:
    try:
        return plan.read(norms)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "the state of galore was made without the residual that this one has"
            f" ({error}). Restore it with the optimizer it was saved with, or begin"
            " anew with tx.init(params)."
        ) from error


def _step(
    matrix: Matrix,
    projectors: Projectors,
    gradient: jax.Array,
    coordinates: jax.Array,
    direction: jax.Array,
) -> Step:
    dtype = accumulation_dtype(gradient, coordinates)
    (side,) = matrix.sides
    # Coordinates are split over more devices than columns of the gradient.
    beside = letter_sharding(explicit_sharding(gradient), matrix.coordinate_letters)
    return Step(
        gradient.astype(dtype),
        place(coordinates, beside).astype(dtype),
        place(direction, beside).astype(dtype),
        matrix.scale,
        functools.partial(turned, matrix, projectors, projectors),
        side.axes,
        side.others,
        matrix.coordinate_letters.index(side.project.split(",")[0][-1]),
    )


def refuse_descent(inner: optax.GradientTransformation, plan: Plan) -> None:
    """Raises unless `inner` goes along a gradient, at its first step.

    Raises:
      ValueError: it goes against it, as what ends in a learning rate does, or nowhere.
    """
    with jax.ensure_compile_time_eval():
        zeros = [jnp.zeros((1,) * ndim) for ndim in plan.ndims]
        nothing, ones = (
            plan.flat.rebuild([x + number for x in zeros], plan.is_full)
            for number in (0, 1)
        )
        update = optax.with_extra_args_support(inner).update
        found, _ = update(ones, inner.init(nothing), nothing)
        first = [jnp.sum(jax.tree.leaves(x)[0]) for x in plan.read(found)]
    # Hyper-parameters that a caller traces are not known.
    known = [float(x) for x in first if not isinstance(x, jax.core.Tracer)]
    if any(x <= 0 for x in known):
        raise ValueError(
            "a residual is added along the gradient, and the inner goes against it, or"
            " nowhere in its first step: it holds a learning rate. Put that around"
            " galore: optax.chain(galore(optax.scale_by_adam(), residual=..., ...),"
            " optax.add_decayed_weights(wd), optax.scale_by_learning_rate(lr)), or use"
            " fira_adamw or apollo_adamw."
        )
