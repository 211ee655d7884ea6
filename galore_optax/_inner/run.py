# SPDX-License-Identifier: Apache-2.0
"""Runs the inner transformation in the coordinates of the current projectors."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from galore_optax._context import within
from galore_optax._inner.decay import away_from_zero
from galore_optax._inner.expected import check_dtypes, check_state
from galore_optax._inner.params_use import Arguments, Decay, ParamsUse, read_use
from galore_optax._inner.readings import Known, Readings, types
from galore_optax._placing.declared import beside_moments
from galore_optax._projector.project import lift, project, zero_coordinates
from galore_optax._selection.leaves import Flat, in_dtype
from galore_optax._selection.matrices import Matrix, Plan
from galore_optax._storage.projectors import Projectors
from galore_optax._xla.order import InTurn, one_by_one
from galore_optax._xla.sharding import leaf_sharding, place, sharding_of

# By position.
Decays: TypeAlias = Mapping[int, Decay]

_NO_DECAY = Decay(None, None)


@dataclasses.dataclass(frozen=True)
class Frame:
    """The coordinate system of one step."""

    plan: Plan
    projectors: tuple[Projectors, ...]
    dtypes: tuple[jnp.dtype, ...]  # what the inner computes in, by leaf
    moment_dtype: jnp.dtype | None = None  # where the user names one for all

    def weights(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        """`Z = PᵀW / scale`, the coordinates that the inner's updates add to."""
        result = list(values)
        for matrix, projectors in self.pairs():
            position = matrix.position
            whole = project(matrix, projectors, values[position])
            scale = jnp.asarray(matrix.scale, whole.dtype)
            result[position] = whole / scale
        return self.cast(result)

    def lift(
        self, updates: Sequence[jax.Array], params: Sequence[jax.Array], decay: Decays
    ) -> list[jax.Array]:
        """`scale · P U + decay` for each projected leaf, the rest as it is.

        Args:
          updates: of the inner, one a leaf.
          params: of the leaves, or what has their shapes and dtypes.
          decay: of projected leaves, by position.
        """
        result = list(updates)
        full, turns = None, InTurn()
        for matrix, projectors in self.pairs():
            position = matrix.position
            low = _scaled(matrix, turns.wait(updates[position]))
            weight, part = params[position], decay.get(position, _NO_DECAY)
            if full is not None:
                (projectors, low), _ = one_by_one((projectors, low), full)
            full = _lift_one(matrix, projectors, low, weight, part)
            turns.lifted(full)
            result[position] = full
        return result

    def cast(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        return list(map(in_dtype, values, self.dtypes))

    def pairs(self) -> list[tuple[Matrix, Projectors]]:
        return list(zip(self.plan.projected, self.projectors, strict=True))


def _scaled(matrix: Matrix, low: jax.Array) -> jax.Array:
    if isinstance(matrix.scale, jax.Array):
        return matrix.scale.astype(low.dtype) * low
    return low * low.dtype.type(matrix.scale)


def _lift_one(
    matrix: Matrix,
    projectors: Projectors,
    low: jax.Array,
    weight: jax.Array,
    decay: Decay,
) -> jax.Array:
    """`P U + decay`; of a 16-bit leaf without an array of its size in more bits.

    There the decay is added to the rounded product, and one that is `b W` in bf16 is
    written `b (P (U / b) + W)`: with `W` as it lies in memory all is one product. Each
    form is off by a few roundings of the sum, as is the update that it becomes.
    """
    sharding, dtype = sharding_of(matrix.path, weight), weight.dtype
    factor, _ = decay
    if dtype == jnp.bfloat16 and factor is not None:
        factor, low = _divided(low, factor, dtype)
        full = lift(matrix, projectors, low, sharding, dtype)
        return _times_sum(factor, full, weight)
    narrow = dtype if dtype.itemsize <= 2 else None
    low = low if narrow is None else low.astype(narrow)
    full = lift(matrix, projectors, low, sharding, narrow)
    array = decay_of(weight, decay)
    return full if array is None else full + array.astype(full.dtype)


# Compiled by themselves, and in place, so that they are traced once for all leaves.
@functools.partial(jax.jit, static_argnums=2, inline=True)
def _divided(
    low: jax.Array, factor: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """`factor` and `low / factor`, both in `dtype`."""
    factor = away_from_zero(factor, dtype)
    return factor, (low / factor.astype(low.dtype)).astype(dtype)


@functools.partial(jax.jit, inline=True)
def _times_sum(factor: jax.Array, full: jax.Array, weight: jax.Array) -> jax.Array:
    return factor * (full + weight)


def decay_of(weight: jax.Array, decay: Decay) -> jax.Array | None:
    """What decay adds to the update of `weight`."""
    factor, array = decay
    return array if factor is None else factor * weight.astype(factor.dtype)


def run_inner(
    inner: optax.GradientTransformation,
    frame: Frame,
    coordinates: Sequence[jax.Array],
    params: Flat | None,
    state: Any,
    extra_args: dict[str, Any],
    readings: Readings,
) -> tuple[list[jax.Array], Decays, Any]:
    """One step of `inner`, in coordinates.

    Args:
      inner: the inner transformation.
      frame: projectors and dtypes.
      coordinates: of the gradients, one a leaf, full size where nothing is projected.
      params: full size, or `None` where the caller has none.
      state: of `inner`.
      extra_args: forwarded to `inner`.
      readings: what is known of `inner`.

    Returns:
      its updates, one a leaf, full size where nothing is projected; the decay that
      `Frame.lift` adds to them; and the new state of `inner`.

    Raises:
      ValueError: `state` is that of another transformation.
    """
    flat, full = frame.plan.flat, frame.plan.is_full
    cast = beside_moments(frame.plan, frame.cast(coordinates))
    low = flat.rebuild(cast, full)
    update = functools.partial(
        optax.with_extra_args_support(inner).update, **extra_args
    )
    if params is None:
        check_state(jax.eval_shape(inner.init, low), state)
        updates, state = update(low, state, None)
        return _leaves(flat, updates), {}, state
    whole = _FullSize(inner.init, update, frame, params, state)
    known = whole.known(None if extra_args else readings)
    inner_params = whole.coordinates(known.reading.use)
    updates, new_state = update(low, state, inner_params)
    return _leaves(flat, updates), whole.decay(known), new_state


def read_inner(
    inner: optax.GradientTransformation,
    frame: Frame,
    params: Flat,
    state: Any,
    readings: Readings,
) -> ParamsUse | None:
    """What `inner` does with params; `None` where it cannot run on their like."""
    update = optax.with_extra_args_support(inner).update
    try:
        whole = _FullSize(inner.init, update, frame, params, state)
        return whole.known(readings).reading.use
    except Exception:  # it needs extra arguments; if not, its update raises it again
        return None


def _leaves(flat: Flat, tree: Any) -> list[jax.Array]:
    return [jax.tree.leaves(node)[0] for node in flat.subtrees(tree)]


@dataclasses.dataclass(frozen=True)
class _FullSize:
    """The inner as it would be at full size, of which only types are looked at."""

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]
    frame: Frame
    params: Flat
    state: Any  # the live one, of coordinates

    def known(self, readings: Readings | None) -> Known:
        """What the inner does with params, and its state at full size."""
        # A structure that is known was checked when it was read.
        return readings.of(self._structure, self._read) if readings else self._read()

    @property
    def _structure(self) -> Hashable:
        state, treedef = jax.tree.flatten(self.state)
        return (
            self.params.treedef,
            types(self.params.values),
            self.frame.dtypes,
            tuple(matrix.position for matrix in self.frame.plan.projected),
            treedef,
            types(state),
        )

    def _read(self) -> Known:
        treedef: Any = jax.tree.structure(self.state)
        shapes = jax.eval_shape(self.init, self._tree(self._values))
        check_state(shapes, self.state)
        if self.frame.moment_dtype is not None:
            check_dtypes(shapes, self.state)

        def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
            updates, new = self.update(
                self._tree(gradients), treedef.unflatten(state), self._tree(params)
            )
            return _leaves(self.params, updates), jax.tree.leaves(new)

        with within(only_read=True):
            return Known(read_use(update, self._arguments(shapes)), shapes)

    def coordinates(self, use: ParamsUse) -> Any:
        """What the inner is to see as params.

        Zeros for a projected leaf where the inner only adds to its weights: the part
        that it adds is `decay`, of all of W, and comes in no second time.
        """
        if use is ParamsUse.COORDINATES:
            return self._tree(self._beside(self.frame.weights(self.params.values)))
        values = list(self.params.values)
        for matrix in self.frame.plan.projected:
            position = matrix.position
            dtype = self.frame.dtypes[position]
            values[position] = zero_coordinates(matrix, values[position], dtype)
        return self._tree(self._beside(self.frame.cast(values)))

    def _beside(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        return beside_moments(self.frame.plan, values)

    def decay(self, known: Known) -> Decays:
        """The part of the update that is linear in the weights, by position."""
        if known.reading.decay is None:
            return {}
        arguments = self._arguments(known.state)
        decays = known.reading.decay(arguments)
        return dict(zip(arguments.weights, decays, strict=True))

    @functools.cached_property
    def _values(self) -> list[jax.Array]:
        return self.frame.cast(self.params.values)

    def _arguments(self, shapes: Any) -> Arguments:
        values = self._values
        # Counters and hyper-parameters are live; of moments only types are needed.
        pairs = zip(*map(jax.tree.leaves, (self.state, shapes)), strict=True)
        return Arguments(
            gradients=values,
            # Under Explicit axes coordinates may be split as the full size is not.
            state=[
                place(x, leaf_sharding(full)) if x.shape == full.shape else full
                for x, full in pairs
            ],
            params=values,
            is_moment=functools.partial(self._is_moment, values, shapes),
            weights=[matrix.position for matrix in self.frame.plan.projected],
        )

    def _is_moment(self, values: Sequence[Any], shapes: Any) -> list[bool]:
        """Which leaves of the state change shape with the weights."""
        larger = list(values)
        for matrix in self.frame.plan.projected:
            leaf = values[matrix.position]
            # Whatever divides a size divides its double too.
            sizes = tuple(2 * size for size in leaf.shape)
            larger[matrix.position] = jax.ShapeDtypeStruct(sizes, leaf.dtype)
        found = jax.eval_shape(self.init, self._tree(larger))
        pairs = zip(*map(jax.tree.leaves, (shapes, found)), strict=True)
        return [full.shape != twice.shape for full, twice in pairs]

    def _tree(self, values: Sequence[Any]) -> Any:
        return self.params.rebuild(values, self.frame.plan.is_full)
