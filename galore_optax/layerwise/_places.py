# SPDX-License-Identifier: Apache-2.0
"""A step a layer at a time, of parameters that are split over devices.

Each device has its part of every layer. Of a stack that is split along its layers, the
devices without a layer would wait for the one that has it, or all would gather it.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding

from galore_optax._context import Declared, Whole, within
from galore_optax._placing.given import Given
from galore_optax._placing.state import Placed, shardings_of
from galore_optax._selection.leaves import flatten
from galore_optax._xla.sharding import leaf_sharding, made_of, names_of, place
from galore_optax.layerwise._parts import EMBED, HEAD, Params, Part, block


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the parameters and the state of one part at a time lie."""

    params: Mapping[str, NamedSharding]  # of all, by path
    declared: Declared  # leaves of blocks without their layer axis
    state: Params  # shardings, likewise

    def keep(self, part: Part, state: Any) -> Any:
        """The state of a part, where it is to lie."""
        return jax.tree.map(place, state, getattr(self.state, part.name))

    def keep_params(self, params: Params) -> Params:
        flat = flatten(params)
        values = [place(x, self.params[path]) for path, x in flat.items()]
        return flat.rebuild(values, [True] * len(values))

    def keep_all(self, state: Params) -> Params:
        """The state of all parts, with the layer axis of blocks."""
        stacked = self.state._replace(blocks=jax.tree.map(_stacked, self.state.blocks))
        return jax.tree.map(place, state, stacked)


def places_of(tx: Placed) -> Places:
    """As `sharded` was told.

    Raises:
      ValueError: of other parameters than a step has, or a stack is split along its
        layers.
    """
    params = tx.given.params
    if not isinstance(params, Params):
        raise ValueError(
            f"sharded was told of parameters in a {type(params).__name__}, and a step"
            " a layer at a time trains layerwise.Params. Make it with these:"
            " sharded(tx, params)."
        )
    _refuse_split_layers(tx.given.shapes.items(), tx.given.leaves)
    leaves = {path: _of_layer(path, x) for path, x in tx.given.leaves.items()}

    def state(part: Part) -> Any:
        mine = part.alone(_shapes_of(part, params))
        flat = flatten(mine)
        given = Given(flat, {path: leaves[path] for path in flat.paths})
        with within(whole=Whole(params, part.layer)):
            return shardings_of(tx.tx, given, tx.spread)

    parts = EMBED, block(EMBED.layer), HEAD
    declared = Declared(leaves, tx.spread)
    return Places(tx.given.leaves, declared, Params(*map(state, parts)))


def refuse_split_layers(params: Params) -> None:
    """Raises where the layer axis of a stack is split, and arrays or types tell."""
    items = list(flatten(params).items())
    _refuse_split_layers(items, {path: leaf_sharding(x) for path, x in items})


def _refuse_split_layers(
    shapes: Iterable[tuple[str, Any]], leaves: Mapping[str, NamedSharding | None]
) -> None:
    for path, value in shapes:
        lying = leaves[path]
        if lying is None or not _is_stacked(path):
            continue
        if over := names_of(lying, len(value.shape))[0]:
            raise ValueError(
                f"axis 0 of '{path}', its {value.shape[0]} layers, is split over"
                f" {' and '.join(map(repr, over))}: a layer at a time, its stack would"
                " be gathered on every device. Split another axis of it,"
                " PartitionSpec(None, ...), or train by the plain step."
            )


def _is_stacked(path: str) -> bool:
    return path.split("/")[0] == "blocks"


def _of_layer(path: str, sharding: NamedSharding) -> NamedSharding:
    if not _is_stacked(path):
        return sharding
    return made_of(sharding.mesh, names_of(sharding, len(sharding.spec))[1:])


def _stacked(sharding: NamedSharding) -> NamedSharding:
    axes = len(sharding.spec)
    return made_of(sharding.mesh, [(), *names_of(sharding, axes)])


def _shapes_of(part: Part, params: Params) -> Any:
    mine = getattr(params, part.name)
    if part.name != "blocks":
        return mine
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), mine)
