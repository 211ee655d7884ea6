# SPDX-License-Identifier: Apache-2.0
"""Where projected arrays live on a device mesh.

A kept axis keeps the mesh axis of its leaf; a rank axis is never sharded. Under an
Explicit mesh the placement is part of the type and is read from the tracer; otherwise
only concrete arrays know theirs, and XLA propagates the rest.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding in the type of `x`, or `None` where the mesh is not Explicit."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def on_mesh(x: Any) -> bool:
    """Whether XLA may split the program that computes `x` over devices.

    By the mesh in its type, Auto meshes too; inside `shard_map` a program is that of
    one device.
    """
    mesh = jax.typeof(x).sharding.mesh
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind is not AxisType.Manual for size, kind in axes)


def leaf_sharding(x: Any) -> NamedSharding | None:
    """Where a leaf lies: by its type if that tells, else by the concrete array."""
    if isinstance(x, jax.core.Tracer):
        return explicit_sharding(x)
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def letter_sharding(
    leaf: NamedSharding | None, letters: Sequence[str]
) -> NamedSharding | None:
    """The sharding of an array whose axes are named by `einsum` letters.

    Axes `a`, `b`, ... are those of the leaf; any other letter is unsharded.
    """
    if leaf is None:
        return None
    of_leaf = {chr(ord("a") + axis): name for axis, name in enumerate(leaf.spec)}
    return NamedSharding(leaf.mesh, PartitionSpec(*map(of_leaf.get, letters)))


def replicated(leaf: NamedSharding | None) -> NamedSharding | None:
    return letter_sharding(leaf, ())


def place(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """`x` laid out by `sharding`; untouched where that is `None`."""
    if sharding is None:
        return x
    if isinstance(x, jax.core.Tracer) or AxisType.Explicit in sharding.mesh.axis_types:
        return jax.sharding.reshard(x, sharding)
    return jax.device_put(x, sharding)
