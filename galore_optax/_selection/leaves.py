# SPDX-License-Identifier: Apache-2.0
"""Parameter trees as flat lists: normalised paths, values, and boxes put back.

A *box* is a pytree node that carries metadata around one array
(`flax.linen.Partitioned`, `flax.nnx.Param`). Its metadata describes the full
array, so it must never travel onto a projected one: boxes are kept around leaves of
unchanged shape and dropped around the others.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from jax.tree_util import GetAttrKey

_Entry = TypeVar("_Entry")

_VALUE = GetAttrKey("value")


def _join(path: tuple[Any, ...]) -> str:
    return "/".join(jax.tree_util.keystr((key,), simple=True) for key in path)


def in_dtype(x: Any, dtype: Any) -> Any:
    """`x` itself where that is its dtype: asking JAX takes a time in large trees."""
    same = x.dtype == dtype and not getattr(x, "weak_type", False)
    return x if same else x.astype(dtype)


def named_leaves(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """Every leaf with its path, in which no box has a part, whatever it holds."""
    return [(_join(path), leaf) for path, leaf in _walk(tree, is_leaf, ())]


def _walk(
    tree: Any, is_leaf: Callable[[Any], bool] | None, above: tuple[Any, ...]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    def ends(node: Any) -> bool:
        return (is_leaf is not None and is_leaf(node)) or _wraps(node)

    for path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=ends)[0]:
        if (is_leaf is None or not is_leaf(node)) and _wraps(node):
            yield from _walk(_children(node)[0][1], is_leaf, above + path)
        else:
            yield above + path, node


def _children(node: Any) -> list[tuple[tuple[Any, ...], Any]]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda child: child is not node
    )
    return pairs


def _wraps(node: Any) -> bool:
    """Whether `node` has one child only, in an attribute named `value`."""
    return [path for path, _ in _children(node)] == [(_VALUE,)]


def by_end(
    known: Mapping[tuple[Any, ...], _Entry], keys: tuple[Any, ...]
) -> _Entry | None:
    """The entry whose keys are the end of `keys`, as a parameter's are in a state."""
    ends = (keys[start:] for start in range(len(keys) + 1))
    return next((known[end] for end in ends if end in known), None)


def is_box(node: Any) -> bool:
    """Whether `node` holds exactly one leaf, in an attribute named `value`."""
    children = _children(node)
    return [path for path, _ in children] == [(_VALUE,)] and jax.tree_util.all_leaves(
        [children[0][1]]
    )


def unboxed(tree: Any) -> Any:
    """`tree` with the arrays of its boxes in their place."""

    def one(node: Any) -> Any:
        return jax.tree.leaves(node)[0] if is_box(node) else node

    return jax.tree.map(one, tree, is_leaf=is_box)


def _rebox(node: Any, value: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(node), [value])


@dataclasses.dataclass(frozen=True)
class Flat:
    """A tree taken apart: one path and one node for each leaf."""

    paths: tuple[str, ...]
    nodes: tuple[Any, ...]  # arrays, or boxes around one array
    treedef: Any  # of the tree with every node, boxed or not, as a leaf

    @functools.cached_property
    def values(self) -> Sequence[Any]:
        return tuple(map(_array, self.paths, self.nodes))

    def items(self) -> list[tuple[str, Any]]:
        return list(zip(self.paths, self.values, strict=True))

    def rebuild(self, values: Sequence[Any], boxed: Sequence[bool]) -> Any:
        """The tree with `values` at its leaves, boxes kept where `boxed`."""
        nodes = [
            _rebox(node, value) if keep else value
            for node, value, keep in zip(self.nodes, values, boxed, strict=True)
        ]
        return self.treedef.unflatten(nodes)

    def subtrees(self, tree: Any) -> list[Any]:
        """What `tree`, of the same outer structure, holds in place of each leaf."""
        return self.treedef.flatten_up_to(tree)


def _array(path: str, node: Any) -> Any:
    leaf = jax.tree.leaves(node)[0]
    if hasattr(leaf, "dtype"):
        return leaf
    array = np.asarray(leaf)
    if array.dtype.kind not in "biufc":
        raise TypeError(
            f"'{path}' is {leaf!r}, and not an array. Pass arrays alone: of an Equinox"
            " model, eqx.filter(model, eqx.is_inexact_array)."
        )
    return array


def check_arrays(tree: Any) -> None:
    """Refuses a tree with a leaf that is no array, by its path, as `init` does.

    Raises:
      TypeError: there is one, such as a function in an Equinox model.
    """
    flat = flatten(tree)
    for path, node in zip(flat.paths, flat.nodes, strict=True):
        _array(path, node)


def flatten(tree: Any) -> Flat:
    """Takes `tree` apart; `None` and `optax.MaskedNode` are no leaves."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
    paths = tuple(_join(path) for path, _ in pairs)
    return Flat(paths, tuple(node for _, node in pairs), treedef)


def masked_paths(tree: Any) -> list[str]:
    """Where a leaf was taken out of `tree`.

    `optax.masked` and `optax.partition` leave a `MaskedNode`, Equinox leaves `None`.
    """
    return [path for path, node in named_leaves(tree, _is_gone) if _is_gone(node)]


def _is_gone(node: Any) -> bool:
    return node is None or is_masked(node)


def is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _capture_placeholder() -> type:
    seen: list[type] = []

    def init(params: Any) -> tuple[()]:
        seen.append(type(params))
        return ()

    optax.tree.map_params(init, lambda leaf: leaf, ())
    return seen[0]


# optax.tree.map_params calls `init` with this instead of parameters; optax does not
# export the class, so it is asked for once.
Placeholder = _capture_placeholder()


def without_placeholders(state: Any, fill: Callable[[], Any]) -> Any:
    """`state` with `fill()` wherever `init(Placeholder())` marked a parameter tree."""
    return jax.tree.map(
        lambda node: fill() if isinstance(node, Placeholder) else node,
        state,
        is_leaf=lambda node: isinstance(node, Placeholder),
    )
