# SPDX-License-Identifier: Apache-2.0
"""Where the parameters lie, in whichever way that is said, checked."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from galore_optax._selection.leaves import Flat, flatten, is_box
from galore_optax._selection.matrices import few
from galore_optax._xla.sharding import leaf_sharding, names_of, shards


@dataclasses.dataclass(frozen=True)
class Given:
    """Parameters as shapes, and where they lie on one mesh."""

    shapes: Flat
    leaves: Mapping[str, NamedSharding]  # by path

    @property
    def params(self) -> Any:
        """The shapes as a tree like the parameters, their boxes included."""
        return self.shapes.treedef.unflatten(self.shapes.nodes)

    @property
    def mesh(self) -> Any:
        return next(iter(self.leaves.values())).mesh


def given(params: Any, shardings: Any = None) -> Given:
    """Reads where `params` lie.

    Args:
      params: arrays, `ShapeDtypeStruct`s or boxes around these.
      shardings: `NamedSharding`s, or what has one as its attribute `sharding`, in a
        tree like `params` or a prefix of it; `None` where the leaves of `params` tell.

    Raises:
      TypeError: a leaf is no array, such as a function of an unfiltered Equinox model.
      ValueError: a leaf lies on no mesh, or on another one; a mesh axis does not divide
        an axis of a leaf.
    """
    flat = flatten(params)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat.values]
    nodes = flat.nodes if shardings is None else _like(flat, shardings)
    found = {
        path: _sharding(path, node)
        for path, node in zip(flat.paths, nodes, strict=True)
    }
    _check_meshes(found)
    for path, value in flat.items():
        _check_axes(path, tuple(value.shape), found[path])
    boxed = [is_box(node) for node in flat.nodes]
    tree = flat.rebuild(shapes, boxed)
    return Given(flatten(tree), found)


def check_declared(given: Given, params: Any) -> None:
    """Raises unless `params` are those that were declared."""
    flat = flatten(params)
    check_paths(given, flat.paths)
    for (path, value), shape in zip(flat.items(), given.shapes.values, strict=True):
        if value.shape != shape.shape:
            raise ValueError(
                f"sharded was told that '{path}' is {shape.shape}, and was given"
                f" {value.shape}. {_REMEDY}"
            )


def check_paths(given: Given, paths: tuple[str, ...]) -> None:
    if paths != given.shapes.paths:
        others = few(set(paths) ^ set(given.shapes.paths))
        raise ValueError(
            "sharded was told of other parameters than it was given; they differ in"
            f" {others}. {_REMEDY}"
        )


_REMEDY = "Make it with the parameters that are trained: sharded(tx, params)."


def _like(flat: Flat, shardings: Any) -> Sequence[Any]:
    """One for each leaf, the leaf itself where `None` is given."""
    places = flat.treedef.unflatten(range(len(flat.nodes)))

    def fill(entry: Any, below: Any) -> Any:
        said = _said(entry)
        return jax.tree.map(lambda i: flat.nodes[i] if said is None else said, below)

    full = jax.tree.map(fill, shardings, places, is_leaf=_says)
    return flat.treedef.flatten_up_to(full)


def _says(entry: Any) -> bool:
    """Whether `entry` is for all leaves in its place, and no node of a tree."""
    known = entry is None or _is_sharding(entry) or is_box(entry)
    return known or hasattr(entry, "sharding")


def _said(entry: Any) -> Any:
    """A sharding, or what has one: MaxText's dimension numbers do."""
    if entry is None or _is_sharding(entry):
        return entry
    content = jax.tree.leaves(entry, is_leaf=_is_sharding) if is_box(entry) else [entry]
    return content[0] if _is_sharding(content[0]) else content[0].sharding


def _is_sharding(node: Any) -> bool:
    return isinstance(node, jax.sharding.Sharding)


def _sharding(path: str, node: Any) -> NamedSharding:
    if _is_sharding(node):
        found = node
    else:
        found = leaf_sharding(jax.tree.leaves(node)[0]) or _of_box(path, node)
    if isinstance(found, NamedSharding):
        return found
    raise ValueError(
        f"'{path}' lies on no mesh, so that nothing tells where its state is to lie."
        " Put the parameters on one, jax.device_put(params, shardings), or pass"
        " NamedShardings in a tree like params as a third argument, which"
        " flax.linen.get_sharding(params, mesh) makes of boxes."
    )


def _of_box(path: str, node: Any) -> NamedSharding | None:
    """From the names of axes in the box of a leaf, of Flax linen or NNX."""
    names = _of(node, "names", "out_sharding")
    mesh = _of(node, "mesh") or _current_mesh()
    if names is None or mesh is None:
        return None
    rules = dict(reversed(_of(node, "rules", "sharding_rules") or ()))
    spec = [rules.get(name, name) if isinstance(name, str) else name for name in names]
    known = set(mesh.axis_names)
    for name in (x for entry in spec for x in _each(entry)):
        if name not in known:
            raise ValueError(
                f"'{path}' has an axis called {name!r}, and the mesh has"
                f" {sorted(known)}. Where names are logical, pass NamedShardings as a"
                " third argument: flax.linen.logical_to_mesh_sharding(specs, mesh,"
                " rules)."
            )
    return NamedSharding(mesh, PartitionSpec(*spec))


def _of(node: Any, *attributes: str) -> Any:
    found = (getattr(node, name, None) for name in attributes)
    return next((x for x in found if x), None)


def _each(entry: Any) -> Iterable[str]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _current_mesh() -> Any:
    """That of `jax.set_mesh`; while tracing only its abstract form is known."""
    try:
        mesh: Any = jax.sharding.get_mesh()
    except ValueError:
        mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def _check_meshes(found: Mapping[str, NamedSharding]) -> None:
    first, *others = found.items()
    for path, sharding in others:
        if sharding.mesh != first[1].mesh:
            raise ValueError(
                f"'{path}' lies on {_mesh(sharding)} and '{first[0]}' on"
                f" {_mesh(first[1])}. Put all parameters on one mesh."
            )
    kinds = set(first[1].mesh.axis_types)
    if len(kinds) > 1 or AxisType.Manual in kinds:
        raise ValueError(
            f"the mesh of '{first[0]}', {_mesh(first[1])}, has axes of the types"
            f" {[str(kind) for kind in first[1].mesh.axis_types]}. Make it with axes"
            " that are all Auto or all Explicit: jax.make_mesh(..., axis_types=...)."
        )


def _mesh(sharding: NamedSharding) -> str:
    sizes = (f"{name}={size}" for name, size in sharding.mesh.shape.items())
    return f"Mesh({', '.join(sizes)})"


def _check_axes(path: str, shape: tuple[int, ...], sharding: NamedSharding) -> None:
    if len(sharding.spec) > len(shape):
        raise ValueError(
            f"'{path}' has {len(shape)} axes, and its sharding {sharding.spec} names"
            f" {len(sharding.spec)}. Name at most one mesh axis, or a tuple, for each."
        )
    for axis, names in enumerate(names_of(sharding, len(shape))):
        parts = shards(sharding.mesh, names)
        if shape[axis] % parts:
            raise ValueError(
                f"axis {axis} of '{path}', {shape[axis]} long, cannot be split over"
                f" {' and '.join(map(repr, names))} into {parts} equal parts. Leave it"
                " unsplit in this leaf's PartitionSpec, or pad it to a multiple."
            )
