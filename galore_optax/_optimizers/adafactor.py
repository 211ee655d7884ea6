# SPDX-License-Identifier: Apache-2.0
"""GaLore with the reference's Adafactor.

Data flow of one step, for each matrix W with projected gradient R:

    step size  lr · max(eps_scale, RMS(W))          from the full parameter
    direction  R / sqrt(row ⊗ col / mean(row))      factored over the projected matrix
    update     clip(direction) · step size, then momentum, all in the projected space
    W          W - scale · P update - weight_decay · step size · W

`optax.adafactor` as an inner would factor over the two longest axes and clip whole
leaves; here stacked layers give the numbers that separate layers give.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from galore_optax._arguments import check_mask
from galore_optax._config import Projection
from galore_optax._galore import Projecting, config_of, with_projection
from galore_optax._projector.project import accumulation_dtype
from galore_optax._selection.dimensions import VECTORS
from galore_optax._selection.leaves import flatten
from galore_optax._selection.matrices import Matrix, Plan
from galore_optax._state import check_type
from galore_optax._transform import projected
from galore_optax._types import Scalar
from galore_optax._wrapping.full_size import with_full_size_rate


class AdafactorState(NamedTuple):
    """State of the inner of `galore_adafactor`; trees like params."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32
    row: Any  # second moment averaged over the columns, of each factored matrix
    col: Any  # second moment averaged over the rows
    v: Any  # second moment of leaves that are not factored
    m: Any  # momentum of scaled updates, MaskedNode throughout without b1


@dataclasses.dataclass(frozen=True)
class _Block:
    """The axes of a leaf, as the inner sees it, that belong together."""

    rows: tuple[int, ...]  # empty where the second moment is not factored
    cols: tuple[int, ...]
    batch: tuple[int, ...]

    def within(self, ndim: int) -> tuple[int, ...]:
        return tuple(axis for axis in range(ndim) if axis not in self.batch)


@dataclasses.dataclass(frozen=True)
class _Settings:
    b1: Scalar | None
    decay_rate: float
    eps: float
    clipping_threshold: float | None


def _blocks(plan: Plan) -> list[_Block]:
    return [
        _full_block(value.ndim, reason) if matrix is None else _projected_block(matrix)
        for matrix, value, reason in zip(
            plan.matrices, plan.flat.values, plan.reasons, strict=True
        )
    ]


def _full_block(ndim: int, reason: str) -> _Block:
    if ndim < 2 or reason in VECTORS:
        return _Block((), (), ())
    return _Block((ndim - 2,), (ndim - 1,), ())


def _projected_block(matrix: Matrix) -> _Block:
    letters = matrix.coordinate_letters
    names = {axis: letter for axis, letter in enumerate(matrix.leaf_letters)}
    for side, rank_letter in zip(matrix.sides, "YZ", strict=False):
        names.update(dict.fromkeys(side.axes, rank_letter))

    def places(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({letters.index(names[axis]) for axis in axes}))

    return _Block(places(matrix.rows), places(matrix.cols), places(matrix.batch))


def _inner(settings: _Settings, plan: Plan) -> optax.GradientTransformationExtraArgs:
    blocks = _blocks(plan)

    def init_fn(params: Any) -> AdafactorState:
        flat = flatten(params)
        leaves = [
            _init_leaf(settings, block, value)
            for block, value in zip(blocks, flat.values, strict=True)
        ]
        return AdafactorState(jnp.zeros([], jnp.int32), *_columns(flat.treedef, leaves))

    def update_fn(
        updates: Any, state: AdafactorState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, AdafactorState]:
        del params
        flat = flatten(updates)
        sizes = extra_args["step_sizes"]
        count = optax.safe_increment(state.count)
        columns = [flat.subtrees(tree) for tree in state[1:]]
        results = [
            _update_leaf(settings, block, count, value, size, *moments)
            for block, value, size, *moments in zip(
                blocks, flat.values, sizes, *columns, strict=True
            )
        ]
        new = flat.rebuild([update for update, _ in results], [True] * len(results))
        moments = _columns(flat.treedef, [leaf for _, leaf in results])
        return new, AdafactorState(count, *moments)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


_Moments = tuple[Any, Any, Any, Any]  # row, col, v, m of one leaf


def _columns(treedef: Any, leaves: list[_Moments]) -> list[Any]:
    return [treedef.unflatten(column) for column in zip(*leaves, strict=True)] or [
        treedef.unflatten([])
    ] * 4


def _init_leaf(settings: _Settings, block: _Block, value: Any) -> _Moments:
    none = optax.MaskedNode()
    zeros = jnp.zeros_like(value, _second_moment_dtype(value))
    m = none if settings.b1 is None else jnp.zeros_like(value)
    if not block.rows:
        return none, none, zeros, m
    return zeros.mean(block.cols), zeros.mean(block.rows), none, m


def _update_leaf(
    settings: _Settings,
    block: _Block,
    count: jax.Array,
    gradient: jax.Array,
    step_size: jax.Array,
    row: Any,
    col: Any,
    v: Any,
    m: Any,
) -> tuple[jax.Array, _Moments]:
    dtype = _second_moment_dtype(gradient)
    keep = 1 - count.astype(dtype) ** -settings.decay_rate
    squares = _square(gradient).astype(dtype) + settings.eps
    wide = gradient.astype(accumulation_dtype(gradient))
    if block.rows:
        row = keep * row + (1 - keep) * squares.mean(block.cols)
        col = keep * col + (1 - keep) * squares.mean(block.rows)
        direction = wide * _factored_rsqrt(block, row, col)
    else:
        v = keep * v + (1 - keep) * squares
        direction = wide * jax.lax.rsqrt(v)
    within = block.within(gradient.ndim)
    if settings.clipping_threshold is not None:
        rms = jnp.sqrt(jnp.mean(_square(direction), within, keepdims=True))
        direction = direction / jnp.maximum(1, rms / settings.clipping_threshold)
    size = step_size.reshape([direction.shape[axis] for axis in block.batch])
    update = -direction * jnp.expand_dims(size, within).astype(dtype)
    update = update.astype(gradient.dtype)
    if settings.b1 is not None:
        update = m = settings.b1 * m + (1 - settings.b1) * update
    return update, (row, col, v, m)


def _second_moment_dtype(x: jax.Array) -> jnp.dtype:
    """f32 at least: from 2,500 steps on, 16 bits round a decay of 0.998 to one."""
    return jnp.finfo(accumulation_dtype(x)).dtype


def _square(x: jax.Array) -> jax.Array:
    """|x|², also where x is complex."""
    x = x.astype(accumulation_dtype(x))
    return x.real**2 + x.imag**2 if jnp.iscomplexobj(x) else x**2


def _factored_rsqrt(block: _Block, row: jax.Array, col: jax.Array) -> jax.Array:
    row = jnp.expand_dims(row, block.cols)
    mean = row.mean(block.rows, keepdims=True)
    return jax.lax.rsqrt(row / mean) * jax.lax.rsqrt(jnp.expand_dims(col, block.rows))


@with_projection
def galore_adafactor(
    learning_rate: optax.ScalarOrSchedule | None = None,
    *,
    b1: Scalar | None = None,
    decay_rate: float = 0.8,
    eps: float = 1e-30,
    eps_scale: float = 1e-3,
    clipping_threshold: float | None = 1.0,
    multiply_by_parameter_scale: bool = True,
    weight_decay: Scalar = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **projection: Unpack[Projection],
) -> optax.GradientTransformationExtraArgs:
    r"""Adafactor on low-rank projections of the gradients, as in the reference.

    With :math:`R = P^T G`, :math:`\beta_t = 1 - t^{-\mathrm{decay\_rate}}` and
    :math:`\alpha_t = lr \cdot \max(\mathrm{eps\_scale}, \mathrm{RMS}(W))`,

    .. math:: V = \beta_t V + (1 - \beta_t)(R^2 + \mathrm{eps}), \quad
        U = \mathrm{clip}(R / \sqrt{V}), \quad
        W \leftarrow W - \mathrm{scale} \cdot P\, \alpha_t U - wd\, \alpha_t W,

    where V is kept as the means of its rows and columns. Factors, clipping and RMS are
    those of each matrix, also where layers are stacked in one leaf.

    Unlike `galore(optax.adafactor(...))`, the RMS is that of the full parameter and not
    of its coordinates.

    Args:
      learning_rate: number or schedule; if `None`, `min(1e-2, 1/sqrt(t))`.
      b1: decay of a momentum of the scaled updates; none if `None`.
      decay_rate: exponent of the second moment's decay.
      eps: added to squared gradients.
      eps_scale: least RMS of a parameter.
      clipping_threshold: greatest RMS of a projected direction; no clipping if `None`.
      multiply_by_parameter_scale: whether the RMS of the parameter scales the step.
      weight_decay: decoupled, multiplied by the scaled step and not by `scale`.
      mask: which leaves decay, as in `optax.add_decayed_weights`.
      **projection: `rank`, `update_proj_gap` and all else that `galore` takes; a
        `moment_dtype` is that of the momentum, and of updates. Second moments are
        small, as they are factored, and f32 at least.

    Returns:
      the transformation; its state is a `GaLoreState`.

    Raises:
      TypeError: `mask` is one value; and as `galore`.
      ValueError: as `galore`; `update` without params where they are needed.

    Example:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.galore_adafactor(1e-2, rank=4)
      >>> state = tx.init({"kernel": jnp.ones((16, 64))})
      >>> state.inner_state.row["kernel"].shape, state.inner_state.col["kernel"].shape
      ((64,), (4,))

    Source: Shazeer and Stern, arXiv 1804.04235; GaLore's reference implementation.
    """
    check_mask(mask)
    config = config_of(projection)
    settings = _Settings(b1, decay_rate, eps, clipping_threshold)
    init, update = projected(lambda plan: _inner(settings, plan), config)
    floor = eps_scale if multiply_by_parameter_scale else None

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        if params is None:
            raise ValueError(
                "galore_adafactor scales its steps by the parameters: call"
                " update(updates, state, params)."
            )
        check_type(state)
        plan = config.selection.plan(params)
        sizes = _step_sizes(plan, _learning_rate(learning_rate, state.count), floor)
        updates, state = update(updates, state, params, step_sizes=sizes, **extra_args)
        if isinstance(weight_decay, (int, float)) and weight_decay == 0:
            return updates, state
        decay = _decay(dict(zip(plan.flat.paths, sizes, strict=True)), weight_decay)
        decay = decay if mask is None else optax.masked(decay, mask)
        updates, _ = decay.update(updates, decay.init(params), params)
        return updates, state

    tx = optax.GradientTransformationExtraArgs(init, update_fn)
    return Projecting(*with_full_size_rate(tx, config))


def _learning_rate(
    learning_rate: optax.ScalarOrSchedule | None, count: jax.Array
) -> Any:
    if learning_rate is None:
        step = count.astype(jnp.float32) + 1
        return jnp.minimum(1e-2, jax.lax.rsqrt(step))
    return learning_rate(count) if callable(learning_rate) else learning_rate


def _step_sizes(plan: Plan, learning_rate: Any, floor: float | None) -> list[jax.Array]:
    """One number a matrix, each array of the batch shape and ones elsewhere."""
    sizes = []
    for matrix, value in zip(plan.matrices, plan.flat.values, strict=True):
        batch = matrix.batch if matrix else ()
        within = tuple(axis for axis in range(value.ndim) if axis not in batch)
        rms = jnp.sqrt(jnp.mean(_square(value), within, keepdims=True))
        factor = jnp.ones_like(rms) if floor is None else jnp.maximum(floor, rms)
        sizes.append(jnp.asarray(learning_rate, factor.dtype) * factor)
    return sizes


def _decay(
    sizes: dict[str, jax.Array], weight_decay: Scalar
) -> optax.GradientTransformation:
    """Subtracts `weight_decay · step size · W` from the updates."""

    def subtract(updates: Any, params: Any) -> Any:
        flat, weights = flatten(updates), flatten(params).values
        values = [
            (
                update
                - weight_decay * sizes[path] * weight.astype(accumulation_dtype(weight))
            ).astype(update.dtype)
            for path, update, weight in zip(
                flat.paths, flat.values, weights, strict=True
            )
        ]
        return flat.rebuild(values, [True] * len(values))

    return optax.stateless(subtract)
