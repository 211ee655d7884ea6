# SPDX-License-Identifier: Apache-2.0
"""A small vision transformer with a convolutional stem, in Flax NNX."""

import jax
import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    """Attention and an MLP, each after a norm and beside a residual."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs):
        self.attn_norm = nnx.LayerNorm(width, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.attn_norm(x))
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class ViT(nnx.Module):
    """(B, 28, 28, 1) -> logits (B, 10), by 16 patches of 7 x 7."""

    def __init__(self, width: int, depth: int, heads: int, rngs: nnx.Rngs):
        self.stem_conv = nnx.Conv(1, width // 2, (3, 3), rngs=rngs)
        self.patch = nnx.Conv(
            width // 2, width, (7, 7), strides=7, padding="VALID", rngs=rngs
        )
        normal = jax.random.normal(rngs.params(), (16, width))
        self.position = nnx.Param(0.02 * normal)
        self.blocks = nnx.List([Block(width, heads, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.patch(nnx.gelu(self.stem_conv(images)))  # (B, 4, 4, width)
        x = x.reshape(len(x), -1, x.shape[-1]) + self.position  # (B, 16, width)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(jnp.mean(x, axis=1)))
