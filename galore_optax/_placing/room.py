# SPDX-License-Identifier: Apache-2.0
"""Whether the devices of a mesh have room for a state, as far as they tell."""

from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding

from galore_optax._asking.held import array_bytes
from galore_optax._asking.leaf_report import size
from galore_optax._storage.moments import name
from galore_optax._xla.sharding import names_of


def refuse_without_room(state: Any, shardings: Any) -> None:
    """Raises where a state, given as shapes, takes more than a device has in all."""
    named = jax.tree_util.tree_leaves_with_path(state)
    places = jax.tree.leaves(shardings)
    room = _smallest(places[0].mesh)
    each = [array_bytes(x, place) for (_, x), place in zip(named, places, strict=True)]
    if room is None or sum(each) <= room:
        return
    most = max(range(len(each)), key=each.__getitem__)
    path, array = named[most]
    raise ValueError(
        f"the state takes {size(sum(each))} on each of {places[0].mesh.size} devices,"
        f" which have {size(room)}. The largest part,"
        f" '{name(path)}', takes {size(each[most])}:"
        f" {_split(places[most], len(array.shape))}. Take a mesh"
        " with more devices, split an axis of that leaf, spread=..., or moments in"
        " eight bits, galore_optax.quantized."
    )


def _smallest(mesh: Any) -> int | None:
    """Bytes of the device with least memory; `None` where they do not tell."""
    devices: Iterable[Any] = () if isinstance(mesh, AbstractMesh) else mesh.devices.flat
    found = [_bytes(x) for x in devices if x.process_index == jax.process_index()]
    return min((x for x in found if x is not None), default=None)


def _bytes(device: Any) -> int | None:
    try:
        found = device.memory_stats()
    except (NotImplementedError, jax.errors.JaxRuntimeError):  # one to compile for
        return None
    return found.get("bytes_limit") if found else None


def _split(place: NamedSharding, axes: int) -> str:
    found = [
        f"axis {axis} is split over {' and '.join(map(repr, names))}"
        for axis, names in enumerate(names_of(place, axes))
        if names
    ]
    return ", ".join(found) or "no axis of it is split"
