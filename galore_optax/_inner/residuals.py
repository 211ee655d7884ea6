# SPDX-License-Identifier: Apache-2.0
"""What updates take from gradients outside of the subspace, leaf by leaf."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax._inner.run import Frame
from galore_optax._projector.project import accumulation_dtype, lift
from galore_optax._selection.matrices import Matrix, Plan
from galore_optax._storage.projectors import Projectors
from galore_optax._xla.sharding import explicit_sharding
from galore_optax.residual import Residual, Step


def initial_norms(plan: Plan, residual: Residual | None) -> Any:
    if residual is None:
        return ()
    shapes = (matrix.batch_shape for matrix in plan.projected)
    return plan.arrange(jnp.zeros(shape, jnp.float32) for shape in shapes)


def add_residuals(
    residual: Residual,
    frame: Frame,
    coordinates: Sequence[jax.Array],
    directions: Sequence[jax.Array],
    lifted: Sequence[jax.Array],
    norms: Any,
) -> tuple[list[jax.Array], Any]:
    """`lifted` with what `residual` adds, and the new norms.

    Args:
      residual: what is added.
      frame: whose plan holds the gradients.
      coordinates: of the gradients, one a leaf.
      directions: of the inner, likewise.
      lifted: updates at full size.
      norms: those that `residual` remembers.

    Raises:
      ValueError: the state was made without a residual.
    """
    result, remembered = list(lifted), []
    for (matrix, projectors), norm in zip(
        frame.pairs(), _read(frame.plan, norms), strict=True
    ):
        at = matrix.position
        gradient = frame.plan.flat.values[at]
        step = _step(matrix, projectors, gradient, coordinates[at], directions[at])
        added, norm = residual.of(step, norm)
        result[at] = result[at] + added.astype(result[at].dtype)
        remembered.append(norm)
    return result, frame.plan.arrange(remembered)


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
    single = [
        1 if axis in side.axes else size for axis, size in enumerate(matrix.shape)
    ]
    lifted = functools.partial(lift, matrix, projectors)
    sharding = explicit_sharding(gradient)
    return Step(
        gradient.astype(dtype),
        coordinates.astype(dtype),
        direction.astype(dtype),
        matrix.scale,
        lambda x: lifted(x, sharding).astype(dtype),
        matrix.coordinate_letters.index(side.project.split(",")[0][-1]),
        tuple(single),
        tuple(sorted((*matrix.rows, *matrix.cols))),
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
            " fira_adamw."
        )
