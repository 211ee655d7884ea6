# SPDX-License-Identifier: Apache-2.0
"""The transformation: project, run the inner optimizer, lift back.

R = PᵀG                      project
U, s = inner(R, s, Z)        any optax transformation, low-rank state
ΔW = scale · P U + decay     lift; the decay acts on all of W, unscaled
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax import _state
from galore_optax._asking.record import record, record_updates
from galore_optax._config import Config
from galore_optax._inner.eager import compiled
from galore_optax._inner.params_use import depends_on_values
from galore_optax._inner.readings import Readings
from galore_optax._inner.residuals import (
    Residuals,
    initial_norms,
    refuse_descent,
    residuals,
)
from galore_optax._inner.run import Frame, read_inner, run_inner
from galore_optax._inner.transport import Transport
from galore_optax._projector.project import initial_projector, project, zero_coordinates
from galore_optax._projector.refresh import (
    Move,
    Refresh,
    When,
    initial_refresh,
    refresh_when_due,
)
from galore_optax._selection.leaves import (
    Flat,
    Placeholder,
    flatten,
    in_dtype,
    without_placeholders,
)
from galore_optax._selection.matrices import Plan, same_leaves
from galore_optax._selection.rule import rank_notice
from galore_optax._state import GaLoreState
from galore_optax._xla.order import one_by_one

InnerOf = Callable[[Plan], optax.GradientTransformation]


def projected(
    inner_of: InnerOf, config: Config
) -> optax.GradientTransformationExtraArgs:
    """`inner_of(plan)` run on projected gradients."""
    readings = Readings()
    return compiled(
        optax.GradientTransformationExtraArgs(
            functools.partial(_init, inner_of, config, readings),
            functools.partial(_update, inner_of, config, readings),
        )
    )


def _init(
    inner_of: InnerOf, config: Config, readings: Readings, params: Any
) -> GaLoreState:
    if isinstance(params, Placeholder):
        return _unlabelled(inner_of, config)
    plan = config.selection.plan(params)
    inner = inner_of(plan)
    inner_params = _initial_coordinates(plan, config)
    _refuse_values(inner, inner_params)
    inner_state = inner.init(inner_params)
    frame = Frame(plan, (), tuple(_dtypes(plan, config)))
    use = read_inner(inner, frame, plan.flat, inner_state, readings)
    notice = rank_notice(plan)
    if config.moments.moves:
        _transport(plan, config, inner, jnp.zeros([], jnp.int32)).check(inner_state)
    if config.residual is not None:
        refuse_descent(inner, plan)
    # Who asks what is inside of a transformation has not made a state to train with.
    if not record(plan, config, use, inner) and notice:
        warnings.warn(notice, UserWarning, stacklevel=3)
    projectors = [
        tuple(initial_projector(matrix, side, leaf) for side in matrix.sides)
        for matrix, leaf in plan.pairs()
    ]
    return GaLoreState(
        count=jnp.zeros([], jnp.int32),
        key=jax.random.PRNGKey(config.seed),
        projector=plan.arrange(map(_state.as_node, projectors)),
        refresh=initial_refresh(plan, config.refresh),
        inner_state=inner_state,
        residual=initial_norms(plan, config.residual),
    )


def _unlabelled(inner_of: InnerOf, config: Config) -> GaLoreState:
    # For optax.tree.map_params. Projected arrays share no axis order with params, so
    # nothing here may be labelled as params-like: a specification of a full matrix
    # would fit a projected one by accident, and mean another axis.
    def leaf() -> jax.Array:
        return jnp.zeros([])

    inner = inner_of(Plan(flatten(()), (), (), 0))
    return GaLoreState(
        count=leaf(),
        key=jax.random.PRNGKey(config.seed),
        projector=leaf(),
        refresh=Refresh(leaf(), leaf(), () if config.refresh is None else leaf()),
        inner_state=without_placeholders(inner.init(Placeholder()), leaf),
        residual=() if config.residual is None else leaf(),
    )


def _initial_coordinates(plan: Plan, config: Config) -> Any:
    """Zeros for each projected leaf, the parameter itself for the rest."""
    leaves = zip(plan.matrices, plan.flat.values, strict=True)
    values = [
        zero_coordinates(matrix, value, dtype) if matrix else _cast(value, dtype)
        for (matrix, value), dtype in zip(leaves, _dtypes(plan, config), strict=True)
    ]
    return plan.flat.rebuild(values, plan.is_full)


def _dtypes(plan: Plan, config: Config, like: Flat | None = None) -> list[jnp.dtype]:
    """What the inner computes in, by leaf, from the dtypes of `like`, or of `plan`."""
    values = (like or plan.flat).values
    return [
        config.inner_dtype(matrix, value.dtype)
        for matrix, value in zip(plan.matrices, values, strict=True)
    ]


def _cast(value: Any, dtype: jnp.dtype) -> Any:
    if value.dtype == dtype:
        return value
    if isinstance(value, jax.ShapeDtypeStruct):
        return value.update(dtype=dtype)
    return value.astype(dtype)


def _refuse_values(inner: optax.GradientTransformation, params: Any) -> None:
    if depends_on_values(inner.init, params):
        raise ValueError(
            "the inner transformation keeps parameter values in its state"
            " (schedule_free, prodigy, dog, madgrad and mechanic do). Inside galore"
            " these would be coordinates, which change meaning at every refresh. Put"
            " it around galore instead, such as"
            " optax.contrib.schedule_free(galore(optax.adam(lr)), lr)."
        )


def _update(
    inner_of: InnerOf,
    config: Config,
    readings: Readings,
    updates: Any,
    state: GaLoreState,
    params: Any = None,
    *,
    refresh: When = None,
    projected: bool = False,
    **extra_args: Any,
) -> tuple[Any, GaLoreState]:
    _state.check_type(state)
    if record_updates(updates):  # somebody asks what reaches it, and runs nothing
        return optax.tree.zeros_like(params), state
    if projected:
        refuse_coordinates(config)
        plan = _plan_of_coordinates(config, updates, params)
        weights: Flat | None = plan.flat
        coordinates = flatten(updates).values
    else:
        plan = _plan(config, updates, params)
        weights = _weights(plan, params)
        state = renew(plan, config, inner_of(plan), state, refresh)
        coordinates = project_all(plan, state)
    like = weights or plan.flat
    frame = Frame(
        plan,
        tuple(_state.read(plan, state)),
        tuple(_dtypes(plan, config, like)),
        config.moment_dtype,
    )
    directions, decay, inner_state = run_inner(
        inner_of(plan),
        frame,
        coordinates,
        weights,
        state.inner_state,
        extra_args,
        readings,
    )
    if config.residual is None:
        more = Residuals(directions, {}, state.residual)
    else:
        more = residuals(
            config.residual, frame, coordinates, directions, state.residual
        )
    lifted = more.lifted(frame, like.values, decay)
    return _emit(plan, lifted, like), state._replace(
        count=optax.safe_increment(state.count),
        inner_state=inner_state,
        residual=more.norms,
    )


def refuse_coordinates(config: Config) -> None:
    """Raises where coordinates are not enough."""
    if config.needs_whole:
        raise ValueError(
            f"{config.needs_whole} is made of what a gradient has outside of"
            " the subspace, and coordinates do not hold that: project_gradients,"
            " update_projected, value_and_projected_grad and layerwise accumulation"
            " give nothing else. Use tx.update with whole gradients, or what needs no"
            " more than coordinates."
        )


def renew(
    plan: Plan,
    config: Config,
    inner: optax.GradientTransformation,
    state: GaLoreState,
    when: When,
    axis_name: Any = None,
) -> GaLoreState:
    """`state` with new projectors wherever one is due, from the gradients in `plan`."""
    moves = config.moments.moves
    projectors, refreshes, moved = refresh_when_due(
        plan,
        [leaf for _, leaf in plan.pairs()],
        _state.read(plan, state),
        state.refresh,
        method=config.subspace,
        stagger=config.stagger,
        rule=config.refresh,
        align_signs=config.moments.align_signs,
        count=state.count,
        key=state.key,
        when=bool(when) if isinstance(when, (bool, np.bool_)) else when,
        move=mover(plan, config, inner, state.count),
        moments=state.inner_state if moves else (),
        axis_name=axis_name,
    )
    nodes = plan.arrange(map(_state.as_node, projectors))
    inner_state = moved if moves else state.inner_state
    return state._replace(projector=nodes, refresh=refreshes, inner_state=inner_state)


def mover(
    plan: Plan, config: Config, inner: optax.GradientTransformation, count: jax.Array
) -> Move:
    """What becomes of the state of `inner` where bases are new."""
    if not config.moments.moves:
        return _unmoved
    return _transport(plan, config, inner, count).move


def _unmoved(old: Any, new: Any, accepted: Any, state: Any) -> Any:
    del old, new, accepted
    return state


def _transport(
    plan: Plan, config: Config, inner: optax.GradientTransformation, count: jax.Array
) -> Transport:
    return Transport(config.moments, inner, plan, _dtypes(plan, config), count)


def project_all(plan: Plan, state: GaLoreState) -> list[jax.Array]:
    """`PᵀG` for each projected leaf of the gradients in `plan`, the leaf elsewhere."""
    result = list(plan.flat.values)
    pairs = zip(plan.projected, _state.read(plan, state), strict=True)
    before: int | None = None
    for matrix, projectors in pairs:
        position = matrix.position
        if before is not None:
            projectors, result[before] = one_by_one(projectors, result[before])
        result[position] = project(matrix, projectors, result[position])
        before = position
    return result


def _plan_of_coordinates(config: Config, updates: Any, params: Any) -> Plan:
    if params is None:
        raise ValueError(
            "update_projected needs params: what was projected cannot be told from"
            " coordinates. Call update_projected(tx, coordinates, state, params)."
        )
    plan = config.selection.plan(params)
    found = flatten(updates)
    same_leaves(plan, found, "params")
    for path, value, matrix, param in zip(
        found.paths, found.values, plan.matrices, plan.flat.values, strict=True
    ):
        expected = matrix.coordinate_shape if matrix else param.shape
        if value.shape != expected:
            raise ValueError(
                f"update_projected was given {value.shape} for '{path}',"
                f" whose coordinates are {expected}. Make them with"
                " galore_optax.project_gradients."
            )
    return plan


def _plan(config: Config, updates: Any, params: Any) -> Plan:
    try:
        return config.selection.plan(updates)
    except ValueError:
        _refuse_other_shapes(updates, params)
        raise


def _refuse_other_shapes(updates: Any, params: Any) -> None:
    """Raises where coordinates were given as if they were gradients."""
    full = {} if params is None else dict(flatten(params).items())
    for path, update in flatten(updates).items():
        if path in full and update.shape != full[path].shape:
            raise ValueError(_other_shape(path, update, full[path]))


def _other_shape(path: str, update: Any, param: Any) -> str:
    return (
        f"the update of '{path}' has shape {update.shape}, its parameter has"
        f" {param.shape}. Pass gradients of these parameters; coordinates of"
        " gradients go to galore_optax.update_projected."
    )


def _weights(plan: Plan, params: Any) -> Flat | None:
    if params is None:
        return None
    flat = _without_functions(plan, flatten(params))
    same_leaves(plan, flat, "params")
    for path, update, param in zip(
        flat.paths, plan.flat.values, flat.values, strict=True
    ):
        if update.shape != param.shape:
            raise ValueError(_other_shape(path, update, param))
    return flat


def _without_functions(plan: Plan, flat: Flat) -> Flat:
    """The leaves of `flat` that updates have too, if all others are no arrays.

    An Equinox model holds functions, where its gradients hold `None`.
    """
    found = dict(zip(flat.paths, flat.nodes, strict=True))
    others = [found[path] for path in found if path not in plan.flat.paths]
    if not others or not all(map(callable, others)):
        return flat
    nodes = tuple(found[path] for path in plan.flat.paths if path in found)
    return dataclasses.replace(plan.flat, nodes=nodes)


def _emit(plan: Plan, directions: Sequence[jax.Array], like: Flat) -> Any:
    """The updates as a tree like the gradients, in the dtypes of the parameters."""
    dtypes = [jax.dtypes.canonicalize_dtype(value.dtype) for value in like.values]
    values = list(map(in_dtype, directions, dtypes))
    return plan.flat.rebuild(values, [True] * len(values))
