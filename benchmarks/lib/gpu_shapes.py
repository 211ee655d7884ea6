# SPDX-License-Identifier: Apache-2.0
"""Trees of LLaMA shapes as a GPU sees them: in 16 bits, and all layers in one leaf."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.lib.subjects import Shapes

_COMPONENTS = 256  # singular values of a gradient above its noise
_NOISE = 0.02


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


def weights(tree: Any, dtype: Any) -> Any:
    return _made(tree, 0, lambda k, s: 0.02 * jax.random.normal(k, s, dtype))


def gradients(tree: Any, dtype: Any) -> Any:
    """Of matrices the leading singular values fall as i^-0.7, over some noise."""
    return _made(tree, 1, lambda k, s: _gradient(k, s, dtype))


def _made(tree: Any, seed: int, make: Any) -> Any:
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_shape)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    compiled = jax.jit(make, static_argnums=1)
    return treedef.unflatten(list(map(compiled, keys, leaves)))


def _gradient(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    one, two, three = jax.random.split(key, 3)
    noise = jax.random.normal(one, shape, dtype)
    if len(shape) == 1:
        return 1e-3 * noise
    *batch, rows, columns = shape
    count = min(_COMPONENTS, rows, columns)
    values = (jnp.arange(1, count + 1) ** -0.7 / math.sqrt(count)).astype(dtype)
    left = jax.random.normal(two, (*batch, rows, count), dtype) * values
    right = jax.random.normal(three, (*batch, count, columns), dtype)
    return (1e-3 * (left @ right + _NOISE * noise)).astype(dtype)
