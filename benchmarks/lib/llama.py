# SPDX-License-Identifier: Apache-2.0
"""A LLaMA in plain JAX: embed, block and head as functions, to be compiled.

Beside the one of examples/llama, whose loss it has, it knows grouped queries and tied
embeddings, and needs no Flax where compilers are installed; records of what steps
hold are of this one.

Letters in shape comments: B sequences, T tokens of one, D width, F hidden width of the
MLP, H query heads, G key heads, K head size, V vocabulary, L layers.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax.layerwise import Model
from galore_optax.memory import Sizes

_NORM_EPS, _ROPE_BASE = 1e-6, 10_000.0  # sizes of no array depend on them


def model(sizes: Sizes) -> Model:
    """The functions of a LLaMA; `batch` is (B, T + 1) int32 tokens.

    Activations have the dtype of the weights; attention weights, norms and the loss are
    computed in f32.
    """

    def block(layer: Any, x: jax.Array, batch: jax.Array) -> jax.Array:
        x = x + _attention(sizes, layer["attn"], _norm(layer["attn_norm"], x))
        return x + _mlp(layer["mlp"], _norm(layer["mlp_norm"], x))

    def head(params: Any, embed: Any, x: jax.Array, batch: jax.Array) -> jax.Array:
        kernel = embed["embedding"].T if sizes.tied else params["kernel"]
        logits = _norm(params["norm"], x) @ kernel  # (B, T, V)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits.astype(jnp.float32), batch[:, 1:]
        )
        return losses.mean()

    return Model(_embed, block, head)


def _embed(params: Any, batch: jax.Array) -> jax.Array:
    return params["embedding"][batch[:, :-1]]  # (B, T, D)


def _norm(params: Any, x: jax.Array) -> jax.Array:
    """x / rms(x) · scale, in f32 inside."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + _NORM_EPS)).astype(x.dtype) * params["scale"]


def _attention(sizes: Sizes, params: Any, x: jax.Array) -> jax.Array:
    def project(name: str) -> jax.Array:
        y = x @ params[name]["kernel"]
        return y.reshape(*x.shape[:2], -1, sizes.head_dim)  # (B, T, H or G, K)

    q, k, v = project("q"), project("k"), project("v")
    q, k = _rotate(q), _rotate(k)
    mixed = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, implementation="xla"
    )  # (B, T, H, K)
    return mixed.reshape(*x.shape[:2], -1) @ params["o"]["kernel"]  # (B, T, D)


def _rotate(x: jax.Array) -> jax.Array:
    """Rotary embedding: pairs (i, i + K/2) turn by position · base^(-2i/K)."""
    tokens, size = x.shape[1], x.shape[3]
    frequency = _ROPE_BASE ** (
        -jnp.arange(0, size, 2, dtype=jnp.float32) / size
    )  # (K/2,)
    angle = jnp.arange(tokens)[:, None] * frequency  # (T, K/2)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]  # (T, 1, K/2)
    first, second = jnp.split(x, 2, axis=-1)  # (B, T, H, K/2) each
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _mlp(params: Any, x: jax.Array) -> jax.Array:
    gate, up = x @ params["gate"]["kernel"], x @ params["up"]["kernel"]  # (B, T, F)
    return (jax.nn.silu(gate) * up) @ params["down"]["kernel"]  # (B, T, D)
