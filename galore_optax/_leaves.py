# SPDX-License-Identifier: Apache-2.0
"""Parameter trees as flat lists: normalised paths, values, and boxes put back.

A *box* is a pytree node that carries metadata around one array
(`flax.linen.Partitioned`, `flax.nnx.Param`). Its metadata describes the full
array, so it must never travel onto a projected one: boxes are kept around leaves of
unchanged shape and dropped around the others.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.tree_util import GetAttrKey


def path_string(path: tuple[Any, ...]) -> str:
    """The path as `a/b/0/kernel`, without the `.value` that a box appends."""
    return "/".join(_names(path))


def _names(path: tuple[Any, ...]) -> list[str]:
    if path and path[-1] == GetAttrKey("value"):
        path = path[:-1]
    return [jax.tree_util.keystr((key,), simple=True) for key in path]


def is_box(node: Any) -> bool:
    """Whether `node` holds exactly one leaf, in an attribute named `value`."""
    children, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda child: child is not node
    )
    if len(children) != 1:
        return False
    ((path, child),) = children
    return path == (GetAttrKey("value"),) and jax.tree_util.all_leaves([child])


def _rebox(node: Any, value: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(node), [value])


@dataclasses.dataclass(frozen=True)
class Flat:
    """A tree taken apart: one path and one node for each leaf."""

    paths: tuple[str, ...]
    nodes: tuple[Any, ...]  # arrays, or boxes around one array
    treedef: Any  # of the tree with every node, boxed or not, as a leaf

    @property
    def values(self) -> list[Any]:
        leaves = [jax.tree.leaves(node)[0] for node in self.nodes]
        return [leaf if hasattr(leaf, "dtype") else np.asarray(leaf) for leaf in leaves]

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


def flatten(tree: Any) -> Flat:
    """Takes `tree` apart; `None` and `optax.MaskedNode` are no leaves."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
    paths = tuple(path_string(path) for path, _ in pairs)
    return Flat(paths, tuple(node for _, node in pairs), treedef)


def masked_paths(tree: Any) -> list[str]:
    """Where `optax.masked` or `optax.partition` took leaves out of `tree`."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)
    return [path_string(path) for path, node in pairs if is_masked(node)]


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
