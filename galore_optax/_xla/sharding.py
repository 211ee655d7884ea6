# SPDX-License-Identifier: Apache-2.0
"""Where arrays lie on a device mesh: what is known of it, and how it is asked for.

Under an Explicit mesh the placement is part of the type and is read from the tracer. Of
an Auto mesh a tracer knows nothing: there it is what was declared for the leaf's path
(`galore_optax.sharded`), and XLA's choice where nothing was.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from galore_optax._context import current

Names: TypeAlias = tuple[str, ...]  # mesh axes over which one array axis is split


def explicit_sharding(x: Any) -> NamedSharding | None:
    """The sharding in the type of `x`, or `None` where the mesh is not Explicit."""
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def sharding_of(path: str, x: Any) -> NamedSharding | None:
    """Where the leaf at `path` is to lie: as declared, else by its type."""
    declared = current().declared
    if declared is None or path not in declared.leaves:
        return explicit_sharding(x)
    return declared.leaves[path]


def on_mesh(x: Any) -> bool:
    """Whether XLA may split the program that computes `x` over devices.

    By the mesh in its type, Auto meshes too, or by what was declared; inside
    `shard_map` a program is that of one device.
    """
    mesh = jax.typeof(x).sharding.mesh
    axes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    in_type = any(size > 1 and kind is not AxisType.Manual for size, kind in axes)
    return in_type or current().declared is not None


def varies_over(x: Any) -> frozenset[Any]:
    """The mesh axes over which `x` differs, inside `shard_map` with `check_vma`."""
    kind: Any = jax.typeof(x)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma


def leaf_sharding(x: Any) -> NamedSharding | None:
    """Where a leaf lies: by its type if that tells, else by the concrete array."""
    if isinstance(x, jax.core.Tracer):
        return explicit_sharding(x)
    sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def names_of(sharding: NamedSharding, axes: int) -> list[Names]:
    """The mesh axes of each array axis."""
    padded = (*sharding.spec, *[None] * (axes - len(sharding.spec)))
    return [(x,) if isinstance(x, str) else tuple(x or ()) for x in padded]


def made_of(mesh: Any, names: Iterable[Names]) -> NamedSharding:
    """The reverse of `names_of`, as JAX itself spells it.

    `jit` compiles anew for another spelling of the same placement: under Explicit axes
    the results of a step name every array axis, under Auto ones no `None` comes last.
    """
    entries = [x[0] if len(x) == 1 else x or None for x in names]
    explicit = AxisType.Explicit in mesh.axis_types
    while entries and entries[-1] is None and not explicit:
        entries.pop()
    return NamedSharding(mesh, PartitionSpec(*entries))


def shards(mesh: Any, names: Names) -> int:
    """Into how many parts these axes of a mesh split an array axis."""
    return math.prod(mesh.shape[name] for name in names)


def fitting(mesh: Any, names: Names, size: int) -> Names:
    """As many of `names`, from the first on, as split `size` evenly."""
    while names and size % shards(mesh, names):
        names = names[:-1]
    return names


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


def is_explicit(sharding: NamedSharding) -> bool:
    return AxisType.Explicit in sharding.mesh.axis_types


def place(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """`x` laid out by `sharding`; untouched where that is `None`."""
    if sharding is None:
        return x
    if is_explicit(sharding):
        return jax.sharding.reshard(x, sharding)
    if isinstance(x, jax.core.Tracer):
        return jax.lax.with_sharding_constraint(x, sharding)
    return jax.device_put(x, sharding)


def everywhere(tree: Any) -> Any:
    """`tree`, whole on every device, where it is known that it may not be."""

    def one(x: jax.Array) -> jax.Array:
        sharding, declared = explicit_sharding(x), current().declared
        mesh = sharding.mesh if sharding else declared and declared.mesh
        return x if mesh is None else place(x, made_of(mesh, ()))

    return jax.tree.map(one, tree)


def lying_like(tree: Any, other: Any) -> Any:
    """`tree`, of the types of `other` under Explicit axes."""
    return jax.tree.map(lambda x, y: place(x, explicit_sharding(y)), tree, other)
