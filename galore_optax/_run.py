# SPDX-License-Identifier: Apache-2.0
"""Runs the inner transformation in the coordinates of the current projectors."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax._inner import ParamsUse, params_use
from galore_optax._leaves import Flat
from galore_optax._matrices import Matrix, Plan
from galore_optax._order import in_turn
from galore_optax._projection import lift, project, zero_coordinates
from galore_optax._sharding import explicit_sharding
from galore_optax._stored import Projectors


@dataclasses.dataclass(frozen=True)
class Frame:
    """The coordinate system of one step."""

    plan: Plan
    projectors: tuple[Projectors, ...]
    dtypes: tuple[jnp.dtype, ...]  # what the inner computes in, by leaf

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
        self, updates: Sequence[jax.Array], like: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """`scale · P U` for each projected leaf, the update itself for the rest."""
        result = list(updates)
        lifted: list[jax.Array] = []
        for matrix, projectors in self.pairs():
            position = matrix.position
            sharding = explicit_sharding(like[position])
            low = in_turn(updates[position], lifted)
            full = lift(matrix, projectors, low, sharding)
            lifted.append(full)
            result[position] = jnp.asarray(matrix.scale, full.dtype) * full
        return result

    def cast(self, values: Sequence[jax.Array]) -> list[jax.Array]:
        return [x.astype(dtype) for x, dtype in zip(values, self.dtypes, strict=True)]

    def pairs(self) -> list[tuple[Matrix, Projectors]]:
        return list(zip(self.plan.projected, self.projectors, strict=True))


def run_inner(
    inner: optax.GradientTransformation,
    frame: Frame,
    coordinates: Sequence[jax.Array],
    params: Flat | None,
    state: Any,
    extra_args: dict[str, Any],
) -> tuple[list[jax.Array], Any]:
    """One step of `inner`, lifted.

    Args:
      inner: the inner transformation.
      frame: projectors and dtypes.
      coordinates: of the gradients, one a leaf, full size where nothing is projected.
      params: full size, or `None` where the caller has none.
      state: of `inner`.
      extra_args: forwarded to `inner`.

    Returns:
      full-size updates, one a leaf, and the new state of `inner`.
    """
    flat, full = frame.plan.flat, frame.plan.is_full
    low = flat.rebuild(frame.cast(coordinates), full)
    like = (params or flat).values
    update = functools.partial(
        optax.with_extra_args_support(inner).update, **extra_args
    )
    if params is None:
        updates, state = update(low, state, None)
        return frame.lift(_leaves(flat, updates), like), state
    run = _Run(inner.init, update, frame, params)
    inner_params = run.zero_coordinates()
    use = run.params_use(low, state, inner_params)
    if use is ParamsUse.COORDINATES:
        inner_params = run.coordinates()
    updates, new_state = update(low, state, inner_params)
    lifted = frame.lift(_leaves(flat, updates), like)
    if use is ParamsUse.ADDITIVE:
        for position, decay in run.linear_part(state).items():
            lifted[position] = lifted[position] + decay.astype(lifted[position].dtype)
    return lifted, new_state


def _leaves(flat: Flat, tree: Any) -> list[jax.Array]:
    return [jax.tree.leaves(node)[0] for node in flat.subtrees(tree)]


@dataclasses.dataclass(frozen=True)
class _Run:
    """What is asked of the inner beyond its one real step."""

    init: Callable[[Any], Any]
    update: Callable[[Any, Any, Any], tuple[Any, Any]]
    frame: Frame
    params: Flat

    def params_use(self, low: Any, state: Any, params: Any) -> ParamsUse:
        of_params = self._inner_tree([not full for full in self.frame.plan.is_full])
        is_data = jax.tree.map(lambda _: True, low), self._moments(params)
        return params_use(self.update, (low, state, params), is_data, of_params)

    def coordinates(self) -> Any:
        return self._inner_tree(self.frame.weights(self.params.values))

    def linear_part(self, state: Any) -> dict[int, jax.Array]:
        """The part of the inner's update that is linear in the weights, by position.

        Its coefficients depend on no gradient and no moment, so the derivative along
        the weights is exactly that part, at full size; whatever else the derivative is
        taken of has no effect on the result and is removed by XLA.
        """
        positions = [matrix.position for matrix in self.frame.plan.projected]
        values = self.frame.cast(self.params.values)
        zeros = jax.tree.map(jnp.zeros_like, self._inner_tree(values))
        full_state = self._full_state(state, zeros)

        def updates(weights: list[jax.Array]) -> list[jax.Array]:
            whole = list(values)
            for position, weight in zip(positions, weights, strict=True):
                whole[position] = weight
            result, _ = self.update(zeros, full_state, self._inner_tree(whole))
            leaves = _leaves(self.params, result)
            return [leaves[position] for position in positions]

        weights = [values[position] for position in positions]
        _, decay = jax.jvp(updates, (weights,), (weights,))
        return dict(zip(positions, decay, strict=True))

    def _inner_tree(self, values: Sequence[Any]) -> Any:
        return self.params.rebuild(values, self.frame.plan.is_full)

    def zero_coordinates(self) -> Any:
        """Zero coordinates, and the parameters that are not projected."""
        values = list(self.params.values)
        for matrix in self.frame.plan.projected:
            position = matrix.position
            values[position] = zero_coordinates(
                matrix, values[position], self.frame.dtypes[position]
            )
        return self._inner_tree(self.frame.cast(values))

    def _moments(self, params: Any) -> Any:
        """Which leaves of the state change shape with the coordinates."""
        values: list[Any] = list(self.frame.cast(self.params.values))
        for matrix in self.frame.plan.projected:
            values[matrix.position] = _twice(_leaves(self.params, params), matrix)
        now = jax.eval_shape(self.init, params)
        then = jax.eval_shape(self.init, self._inner_tree(values))
        return jax.tree.map(lambda a, b: a.shape != b.shape, now, then)

    def _full_state(self, state: Any, params: Any) -> Any:
        """`state` at full size: live counters and hyper-parameters, zero moments."""
        shapes: Any = jax.eval_shape(self.init, params)
        expected: Any = jax.tree.structure(shapes)
        if expected != jax.tree.structure(state):
            raise ValueError(
                "the state of the inner transformation has another structure for full"
                " matrices than for projected ones, so its weight decay cannot be told"
                " apart. Choose labels and masks by path, not by the number of axes."
            )
        return jax.tree.map(
            lambda x, full: x if x.shape == full.shape else jnp.zeros_like(full),
            state,
            shapes,
        )


def _twice(leaves: list[jax.Array], matrix: Matrix) -> jax.ShapeDtypeStruct:
    """Another shape, which whatever divides the sizes of this one divides too."""
    leaf = leaves[matrix.position]
    return jax.ShapeDtypeStruct(tuple(2 * size for size in leaf.shape), leaf.dtype)
