# SPDX-License-Identifier: Apache-2.0
"""The sharding of every array in a state."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding

from galore_optax._asking.held import Keys, array_bytes, unboxed
from galore_optax._asking.record import galore_states, heard, is_state
from galore_optax._placing import rules
from galore_optax._placing.given import Given, given
from galore_optax._selection.leaves import by_end, is_box
from galore_optax._selection.matrices import Matrix, Plan
from galore_optax._state import GaLoreState, as_node
from galore_optax._storage.moments import is_coded
from galore_optax._xla.sharding import Names, made_of, names_of


class Placed(optax.GradientTransformationExtraArgs):
    """A transformation that keeps its state where it was declared to lie."""

    tx: optax.GradientTransformation  # by itself
    given: Given
    spread: Names
    shardings: Any  # of the state


def state_shardings(
    tx: optax.GradientTransformation,
    params: Any,
    shardings: Any = None,
    *,
    spread: str | tuple[str, ...] = (),
) -> Any:
    """Where every array of the state of `tx` is to lie, from where `params` lie.

    Moments of what is not projected lie like their leaf. Coordinates and their moments
    have the mesh axes of the leaf's batch and kept axes, a projector those of its batch
    and projected ones; a mesh axis that splits an axis which an array has not, kept or
    projected, splits the other there, or a batch axis if that other does not divide. A
    rank axis is never split.

    Whole on every device are counters and keys; what has neither the shape of a leaf
    nor of its coordinates (the factors of `optax.adafactor`); scales of moments in
    eight bits where a block would lie on two devices, and those of `codes.dynamic`,
    whose blocks run across axes; scales of coded projectors with fewer blocks than
    devices.

    For `jax.jit(tx.init, out_shardings=...)`, for the shardings of a step, and as a
    target for a checkpointer. Nothing is computed or allocated.

    Args:
      tx: any transformation, with `galore` anywhere inside it; of `sharded`, what was
        declared there.
      params: the parameters: arrays or `jax.ShapeDtypeStruct`s with a `NamedSharding`,
        boxes of Flax linen or an `nnx.State` that name axes of their own mesh or of
        `jax.set_mesh`.
      shardings: `NamedSharding`s in a tree like `params` or a prefix of it, where
        `params` are shapes alone; or what has one as its attribute `sharding`, such as
        MaxText's `MuonDimensionNumbers`; `None` where `params` tell.
      spread: mesh axes over which the state is split besides, wherever they divide an
        axis and the leaf does not use them (ZeRO).

    Returns:
      a tree like `tx.init(params)` of `NamedSharding`s.

    Raises:
      TypeError: `tx` is no transformation; a leaf is no array.
      ValueError: a leaf lies on no mesh, or on another mesh than the rest, or is split
        unevenly; a mesh axis of `spread` does not exist; axes are Auto and Explicit.

    Example:
      >>> import galore_optax, jax, jax.numpy as jnp, optax
      >>> from jax.sharding import AbstractMesh, AxisType, NamedSharding
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = AbstractMesh((16,), ("fsdp",), axis_types=(AxisType.Auto,))
      >>> params = {"up": {"kernel": jax.ShapeDtypeStruct(
      ...     (256, 1024), jnp.float32, sharding=NamedSharding(mesh, P(None, "fsdp")))}}
      >>> tx = galore_optax.galore(optax.adam(1e-3), rank=32)
      >>> places = galore_optax.state_shardings(tx, params)
      >>> places.projector["up"]["kernel"].spec
      P('fsdp',)
      >>> places.inner_state[0].mu["up"]["kernel"].spec
      P(None, 'fsdp')
    """
    if isinstance(tx, Placed):
        return tx.shardings
    return shardings_of(tx, given(params, shardings), spread_over(spread))


def spread_over(spread: str | tuple[str, ...]) -> Names:
    return (spread,) if isinstance(spread, str) else tuple(spread)


def shardings_of(tx: optax.GradientTransformation, given: Given, spread: Names) -> Any:
    """As `state_shardings`."""
    return placed_state(tx, given, spread)[1]


def placed_state(
    tx: optax.GradientTransformation, given: Given, spread: Names
) -> tuple[Any, Any]:
    """The state as shapes, and where each of its arrays is to lie."""
    _check_spread(given, spread)
    records, state = heard(tx, given.params)
    states = galore_states(records, state)
    plans = {id(old): x.plan for x, old in zip(records, states, strict=True)}
    places = _Places(given, spread, _owners(given), plans)
    return state, jax.tree.map(_spelled, state, places.of(state))


def _spelled(x: Any, sharding: NamedSharding) -> NamedSharding:
    return made_of(sharding.mesh, names_of(sharding, len(x.shape)))


class PerDevice(NamedTuple):
    """What each device of a mesh holds of a state, in bytes."""

    devices: int
    bytes: int
    everywhere: int  # of these, what every other device holds too


def per_device(tx: Any, params: Any, state: Any) -> PerDevice | None:
    """Of the state that `tx` makes of `params`; `None` where they lie on no mesh."""
    try:
        shardings = state_shardings(tx, params)
    except ValueError:
        return None
    sizes: list[tuple[int, bool]] = [
        (array_bytes(x, place), place.is_fully_replicated)
        for x, place in zip(*map(jax.tree.leaves, (state, shardings)), strict=True)
    ]
    devices = jax.tree.leaves(shardings)[0].mesh.size
    whole = sum(size for size, same in sizes if same)
    return PerDevice(devices, sum(size for size, _ in sizes), whole)


def _check_spread(given: Given, spread: Names) -> None:
    for name in spread:
        if name not in given.mesh.shape:
            raise ValueError(
                f"spread={name!r} is no axis of the mesh of the parameters, which has"
                f" {list(given.mesh.shape)}. Name one of these."
            )


def _owners(given: Given) -> dict[Keys, tuple[str, Any]]:
    """Path and shape of each leaf, by its keys in the tree."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(given.params, is_leaf=is_box)
    return {
        unboxed(keys): item
        for (keys, _), item in zip(pairs, given.shapes.items(), strict=True)
    }


@dataclasses.dataclass(frozen=True)
class _Places:
    given: Given
    spread: Names
    owners: Mapping[Keys, tuple[str, Any]]
    plans: Mapping[int, Plan]  # by the identity of a GaLoreState
    matrices: Mapping[str, Matrix | None] = dataclasses.field(default_factory=dict)

    def of(self, tree: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            self._one, tree, is_leaf=lambda x: is_state(x) or is_coded(x)
        )

    def _one(self, keys: Keys, node: Any) -> Any:
        if is_state(node):
            return self._of_galore(self.plans[id(node)], node)
        if is_coded(node):
            return rules.coded(self._moment(keys, node.codes), *node)
        return self._moment(keys, node)

    def _of_galore(self, plan: Plan, state: GaLoreState) -> GaLoreState:
        by_path = dict(zip(plan.flat.paths, plan.matrices, strict=True))
        inside = dataclasses.replace(self, matrices=by_path)
        small = (state.count, state.key, state.refresh, state.residual)
        count, key, refresh, norms = jax.tree.map(lambda _: self._whole, small)
        projectors = plan.arrange(map(self._projectors, plan.projected))
        inner = inside.of(state.inner_state)
        return GaLoreState(count, key, projectors, refresh, inner, norms)

    def _projectors(self, matrix: Matrix) -> Any:
        leaf = self.given.leaves[matrix.path]
        place = functools.partial(rules.stored, leaf=leaf, spread=self.spread)
        return as_node(tuple(place(matrix, side) for side in matrix.sides))

    def _moment(self, keys: Keys, array: Any) -> NamedSharding:
        """Like its leaf, or the coordinates of it, or whole on every device."""
        place, shape = unboxed(keys), tuple(array.shape)
        path, leaf = by_end(self.owners, place) or ("", None)
        matrix = self.matrices.get(path)
        if leaf is not None and matrix and shape == matrix.coordinate_shape:
            return rules.coordinates(matrix, self.given.leaves[path], self.spread)
        if leaf is not None and shape == tuple(leaf.shape):
            return rules.moment(self.given.leaves[path], shape, self.spread)
        return self._whole

    @property
    def _whole(self) -> NamedSharding:
        return rules.whole(self.given.mesh)
