# SPDX-License-Identifier: Apache-2.0
"""Trees of LLaMA shapes as a GPU sees them: in 16 bits, and all layers in one leaf."""

from typing import Any

import jax
import jax.numpy as jnp

from subjects import Shapes


def is_shape(node: Any) -> bool:
    return type(node) is tuple


def stacked(shapes: Shapes) -> Any:
    """`shapes.tree()` with one leaf for all layers, the layer axis first."""
    tree = shapes.tree()
    layers = [tree.pop(f"layers_{number}") for number in range(shapes.layers)]
    stack = jax.tree.map(lambda x: (len(layers), *x), layers[0], is_leaf=is_shape)
    return tree | {"layers": stack}


def abstract(tree: Any, dtype: Any = jnp.bfloat16) -> Any:
    """Arrays of these shapes, without numbers."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype), tree, is_leaf=is_shape
    )
