# SPDX-License-Identifier: Apache-2.0
"""Equal trees as one with a leading layer axis, and back."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax._selection.leaves import named_leaves


def stack(blocks: Sequence[Any]) -> Any:
    """One tree whose leaves have a leading axis of layers.

    Args:
      blocks: trees of arrays, or of their shapes; equal ones.

    Returns:
      the tree, as `Params.blocks` is to be.

    Raises:
      ValueError: there is none, or one is not as the first; the leaf is named.

    Example:
      >>> import jax.numpy as jnp
      >>> from galore_optax import layerwise
      >>> layerwise.stack([{"w": jnp.ones((8, 4))}] * 3)["w"].shape
      (3, 8, 4)
    """
    if not blocks:
        raise ValueError(
            "there is no block to stack. Give a list of at least one, or a module whose"
            " arrays have a leading layer axis."
        )
    for number, block in enumerate(blocks):
        _check(number, block, blocks[0])
    return jax.tree.map(lambda *leaves: _stacked(leaves), *blocks)


def unstack(blocks: Any) -> list[Any]:
    """The layers of a tree that `stack` made, one by one.

    Example:
      >>> import jax.numpy as jnp
      >>> from galore_optax import layerwise
      >>> [layer["w"].shape for layer in layerwise.unstack({"w": jnp.ones((3, 8, 4))})]
      [(8, 4), (8, 4), (8, 4)]
    """
    (layers,) = {leaf.shape[0] for leaf in jax.tree.leaves(blocks)}
    return [jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(layers)]


def _stacked(leaves: Sequence[Any]) -> Any:
    first = leaves[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(leaves), *first.shape), first.dtype)
    return jnp.stack(leaves)


def _check(number: int, block: Any, first: Any) -> None:
    mine, wanted = _types(block), _types(first)
    for path in sorted(wanted.keys() | mine.keys()):
        found, expected = mine.get(path, "nothing"), wanted.get(path, "nothing")
        if found != expected:
            raise ValueError(
                f"block {number} is not as block 0: '{path}' is {found}, where block 0"
                f" has {expected}. Layers are run by one program and have to be equal."
                " Move the block that differs into the embedding or the head."
            )
    built: Any = jax.tree.structure(block)
    if built != jax.tree.structure(first):
        raise ValueError(
            f"block {number} is not as block 0: its leaves are the same, in containers"
            " of other types or fields. Make all blocks alike."
        )


def _types(block: Any) -> dict[str, str]:
    return {
        path: f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
        for path, leaf in named_leaves(block)
    }
