# SPDX-License-Identifier: Apache-2.0
"""LLaMA in Flax NNX: RMSNorm, rotary attention, SwiGLU, untied head, scanned layers.

Letters in shape comments: B batch, T tokens, D width, H heads, K head size, V
vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model; the defaults are those of the demo."""

    vocab: int = 2048
    width: int = 256
    hidden: int = 688  # of the MLP
    layers: int = 4
    heads: int = 4
    max_tokens: int = 128
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    init_std: float = 0.02


def _linear(config: Config, d_in: int, d_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(config.init_std)
    return nnx.Linear(d_in, d_out, use_bias=False, kernel_init=init, rngs=rngs)


class Attention(nnx.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.q = _linear(config, width, width, rngs)
        self.k = _linear(config, width, width, rngs)
        self.v = _linear(config, width, width, rngs)
        self.o = _linear(config, width, width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        split = (*x.shape[:2], self.config.heads, -1)
        q, k, v = (
            f(x).reshape(split) for f in (self.q, self.k, self.v)
        )  # (B, T, H, K)
        q, k = (rotate(y, self.config.rope_base) for y in (q, k))
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)  # (B, T, H, K)
        return self.o(mixed.reshape(x.shape))  # (B, T, D)


def rotate(x: jax.Array, base: float) -> jax.Array:
    """Rotary embedding: pairs (i, i + K/2) turn by position · base^(-2i/K)."""
    tokens, size = x.shape[1], x.shape[3]
    frequency = base ** (-jnp.arange(0, size, 2) / size)  # (K/2,)
    angle = jnp.arange(tokens)[:, None] * frequency  # (T, K/2)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]  # (T, 1, K/2)
    first, second = jnp.split(x, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.gate = _linear(config, config.width, config.hidden, rngs)
        self.up = _linear(config, config.width, config.hidden, rngs)
        self.down = _linear(config, config.hidden, config.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        eps = config.norm_eps
        self.attn_norm = nnx.RMSNorm(config.width, epsilon=eps, rngs=rngs)
        self.attn = Attention(config, rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, epsilon=eps, rngs=rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class LLaMA(nnx.Module):
    """Tokens (B, T) to logits (B, T, V); layer parameters have a leading layer axis."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.init_std)

        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.embed = nnx.Embed(
            config.vocab, config.width, embedding_init=init, rngs=rngs
        )
        self.layers = stack(rngs)
        self.norm = nnx.RMSNorm(config.width, epsilon=config.norm_eps, rngs=rngs)
        self.lm_head = _linear(config, config.width, config.vocab, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block: Block, x: jax.Array) -> jax.Array:
            return block(x)

        x = run(self.layers, self.embed(tokens))
        return self.lm_head(self.norm(x))


def parameter_count(model: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
