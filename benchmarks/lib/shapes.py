# SPDX-License-Identifier: Apache-2.0
"""LLaMA shapes, and weights and gradients of them."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.memory import Sizes

VOCAB = 32_000
TURN = 0.6435  # radians that a gradient turns between refreshes: 0.8 old + 0.6 new
_COMPONENTS = 256  # singular values of a stacked gradient above its noise
_NOISE = 0.02


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Those of a LLaMA; with no vocabulary, of its blocks alone."""

    width: int
    hidden: int
    layers: int
    vocab: int = VOCAB

    @classmethod
    def load(cls, name: str) -> "Shapes":
        sizes = Sizes.load(name.lower())
        return cls(sizes.width, sizes.hidden, sizes.layers, sizes.vocab)

    def tree(self) -> Any:
        """One leaf a matrix."""
        layers = {f"layers_{i}": self._layer() for i in range(self.layers)}
        return layers | self._ends()

    def stacked(self) -> Any:
        """One leaf for all layers, as a scanned model has it, the layer axis first."""
        layers = jax.tree.map(
            lambda x: (self.layers, *x), self._layer(), is_leaf=is_shape
        )
        return {"layers": layers} | self._ends()

    def _ends(self) -> Any:
        if not self.vocab:
            return {}
        return {
            "embed": {"embedding": (self.vocab, self.width)},
            "lm_head": {"kernel": (self.width, self.vocab)},
            "norm": {"scale": (self.width,)},
        }

    def _layer(self) -> Any:
        width, hidden = self.width, self.hidden
        attention = {name: {"kernel": (width, width)} for name in "qkvo"}
        mlp = {name: {"kernel": (width, hidden)} for name in ("gate", "up")}
        mlp["down"] = {"kernel": (hidden, width)}
        norms = {f"{name}_norm": {"scale": (width,)} for name in ("attn", "mlp")}
        return {"attn": attention, "mlp": mlp, **norms}

    def matrices(self) -> dict[tuple[int, int], int]:
        """How many are projected, by shorter and longer side."""
        sides = {(self.width, self.width): 4, (self.width, self.hidden): 3}
        return {side: count * self.layers for side, count in sides.items()}

    def others(self) -> int:
        """Parameters that are not projected."""
        norms = 2 * self.layers + bool(self.vocab)
        return (2 * self.vocab + norms) * self.width


QUICK = Shapes(256, 688, 2, vocab=0)


def is_shape(node: Any) -> bool:
    return type(node) is tuple


def named(tree: Any) -> dict[str, Any]:
    """Leaves by path, such as layers/attn/q/kernel."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_shape)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


def abstract(tree: Any, dtype: Any = jnp.bfloat16) -> Any:
    """Arrays of these shapes, without numbers."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype), tree, is_leaf=is_shape
    )


def made(tree: Any, seed: int, make: Callable[..., jax.Array]) -> Any:
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_shape)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(map(jax.jit(make, static_argnums=1), keys, leaves))


def weights(tree: Any, dtype: Any = jnp.float32) -> Any:
    return made(tree, 0, lambda k, s: 0.02 * jax.random.normal(k, s, dtype))


def gradients(tree: Any, seed: int = 1) -> Any:
    return made(tree, seed, gradient)


@functools.partial(jax.jit, static_argnums=1)
def gradient(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Singular values near i^-0.7, flatter than those of real gradients."""
    if len(shape) == 1 or VOCAB in shape:
        return 1e-3 * jax.random.normal(key, shape)
    one, two = jax.random.split(key)
    short = min(shape)
    left = jax.random.normal(one, (shape[0], short)) * jnp.arange(1, short + 1) ** -0.7
    return 1e-3 * left @ jax.random.normal(two, (short, shape[1])) / short


def large_gradients(tree: Any, dtype: Any) -> Any:
    """In `dtype` throughout; of the leading singular values alone, over some noise."""
    return made(tree, 1, lambda k, s: _large_gradient(k, s, dtype))


def _large_gradient(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
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


@jax.jit
def turned(old: Any, new: Any, angle: float | jax.Array = TURN) -> Any:
    """`old` on its way to `new`, at no loss of size between independent ones."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jax.tree.map(lambda a, b: cos * a + sin * b, old, new)
