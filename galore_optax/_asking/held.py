# SPDX-License-Identifier: Apache-2.0
"""Which arrays of a state belong to which leaf of the parameters, and their bytes.

An array of a state lies where its leaf lies in a tree like params: its path is some
path of the state's own, the leaf's, and what divides the leaf's share (the two
projectors of a pair, codes and scales). Keys are compared and not their names, so that
a leaf called `mu` is not the field of Adam's state.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.tree_util import GetAttrKey, SequenceKey

from galore_optax._asking.yardstick import is_narrow
from galore_optax._selection.leaves import is_box
from galore_optax.codes import Quantized
from galore_optax.codes.affine import QuantizedProjector

_BOX = GetAttrKey("value")
_OURS = frozenset(map(GetAttrKey, ("projector", "refresh", "residual", "error")))
_CODED = frozenset((*Quantized._fields, *QuantizedProjector._fields))

Keys = tuple[Any, ...]


@dataclasses.dataclass
class Held:
    """What a state holds for one leaf."""

    bytes: int = 0
    moments: list[Any] = dataclasses.field(default_factory=list)

    def wider(self, dtype: Any) -> int:
        """Bytes above those of moments in `dtype`, if that has 16 bits."""
        if not is_narrow(dtype):
            return 0
        sizes = [(np.dtype(x.dtype).itemsize - dtype.itemsize, x) for x in self.moments]
        return sum(more * math.prod(x.shape) for more, x in sizes if more > 0)


def held_by_leaf(state: Any, params: Any) -> list[Held]:
    """What `state` holds for each leaf of `params`, in their order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_box)
    found = {unboxed(keys): Held() for keys, _ in leaves}
    pairs, _ = jax.tree_util.tree_flatten_with_path(state)
    for keys, array in pairs:
        _add(array, keys, found)
    return [found[unboxed(keys)] for keys, _ in leaves]


def _add(array: Any, keys: Keys, found: dict[Keys, Held]) -> None:
    places = list(_places(keys))
    for start in range(len(keys) + 1):
        for place in places:
            owner = found.get(place[start:])
            if owner is not None and start <= len(place):
                owner.bytes += array_bytes(array)
                if place == places[0] and _OURS.isdisjoint(place[:start]):
                    owner.moments.append(array)
                return


def _places(keys: Keys) -> Iterator[Keys]:
    """`keys` without what may divide a leaf's share, more of it each time."""
    place = unboxed(keys)
    yield place
    while place and _divides(place[-1]):
        place = unboxed(place[:-1])
        yield place


def unboxed(keys: Keys) -> Keys:
    return keys[:-1] if keys and keys[-1] == _BOX else keys


def _divides(key: Any) -> bool:
    return isinstance(key, SequenceKey) or (
        isinstance(key, GetAttrKey) and key.name in _CODED
    )


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, or of what its shapes stand for."""
    return sum(map(array_bytes, jax.tree.leaves(tree)))


def array_bytes(array: Any, sharding: Sharding | None = None) -> int:
    """Bytes of an array, or of one device's part of it."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.eval_shape(jax.random.key_data, array)
    shape = sharding.shard_shape(array.shape) if sharding else array.shape
    return math.prod(shape) * np.dtype(array.dtype).itemsize
