# SPDX-License-Identifier: Apache-2.0
"""LLaMA in Flax NNX: RMSNorm, rotary attention, SwiGLU, scanned layers.

Queries may share keys and values in groups, and the head may be the embedding.

Letters in shape comments: B batch, T tokens, D width, F hidden width of the MLP, H
heads, G heads of keys and values, K head size, V vocabulary.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from galore_optax.memory import config_path

SIZES = Path(__file__).with_name("sizes")
# Our field: the key of Hugging Face's config.json.
KEYS = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "hidden": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_heads": "num_key_value_heads",
    "max_tokens": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_base": "rope_theta",
    "init_std": "initializer_range",
    "tied": "tie_word_embeddings",
}
# What this LLaMA is, where others of the same keys differ.
_FIXED = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a model, as in a `config.json`."""

    vocab: int
    width: int
    hidden: int  # of the MLP
    layers: int
    heads: int
    max_tokens: int
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    init_std: float = 0.02
    key_heads: int = 0  # of keys and values; 0: as many as of queries
    tied: bool = False  # the head's kernel is the embedding

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_heads", self.key_heads or self.heads)
        if self.width % (2 * self.heads):
            raise ValueError(
                f"hidden_size={self.width} must be a multiple of twice"
                f" num_attention_heads={self.heads}: rotary positions turn pairs."
            )
        if self.heads % self.key_heads:
            raise ValueError(
                f"num_attention_heads={self.heads} must be a multiple of"
                f" num_key_value_heads={self.key_heads}: groups of queries share keys."
            )

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def key_width(self) -> int:
        """Of all keys of a token, and of all its values."""
        return self.key_heads * self.head_size

    @property
    def smallest(self) -> int:
        """The largest rank that every matrix of a layer can have."""
        return min(self.width, self.hidden, self.key_width)

    @classmethod
    def load(cls, name: str) -> "Config":
        """By a name in `memory.config_names()`, or the path of a `config.json`.

        A file in `sizes` says more than the planner's of the same name.
        """
        own = SIZES / f"{name}.json"
        path = own if own.is_file() else config_path(name)
        found = json.loads(path.read_text())
        found |= _rope(found)
        _refuse_variants(found, path)
        fields = {field: found[key] for field, key in KEYS.items() if key in found}
        return cls(**fields)

    def to_hugging_face(self) -> dict[str, Any]:
        """The contents of a `config.json` for `transformers`."""
        found = json.loads(config_path("demo").read_text())
        found |= {key: getattr(self, field) for field, key in KEYS.items()}
        if self.key_heads == self.heads:  # said by those alone that have fewer
            del found[KEYS["key_heads"]]
        return found


def _rope(found: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions as keys of their own, which newer `transformers` nest."""
    nested = found.get("rope_parameters") or {}
    kind = nested.get("rope_type", "default")
    scaled = {} if kind == "default" else {"rope_scaling": nested}
    return {k: v for k, v in nested.items() if k == KEYS["rope_base"]} | scaled


def _refuse_variants(found: dict[str, Any], path: Path) -> None:
    size = found["hidden_size"] // found["num_attention_heads"]
    for key, known in (_FIXED | {"head_dim": size}).items():
        if found.get(key, known) not in (known, None):
            raise ValueError(
                f"{path}: {key}={found[key]}, but this LLaMA has {key}={known} alone."
                " Take weights of such a model."
            )
    if KEYS["max_tokens"] not in found:
        raise ValueError(
            f"{path} has no {KEYS['max_tokens']}: it holds what the memory planner"
            " needs, and no more. Give the config.json that is beside the weights."
        )


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How a model computes, whatever its sizes."""

    compute: str = "float32"  # dtype of activations and products
    params: str = "float32"  # dtype of the weights
    remat: bool = False  # keep no activations inside a layer, compute them again
    attention: str = "xla"  # `implementation` of jax.nn.dot_product_attention


class Linear(nnx.Linear):
    """On any leading axes, taken as one.

    XLA's CPU backend contracts two axes, as in the kernel's gradient from (B, T, D), at
    half the speed of one.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        flat = super().__call__(x.reshape(-1, x.shape[-1]))
        return flat.reshape(*x.shape[:-1], -1)


def _linear(
    config: Config, numerics: Numerics, d_in: int, d_out: int, rngs: nnx.Rngs
) -> Linear:
    return Linear(
        d_in,
        d_out,
        use_bias=False,
        kernel_init=nnx.initializers.normal(config.init_std),
        dtype=jnp.dtype(numerics.compute),
        param_dtype=jnp.dtype(numerics.params),
        rngs=rngs,
    )


def _norm(config: Config, numerics: Numerics, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.width,
        epsilon=config.norm_eps,
        dtype=jnp.dtype(numerics.compute),
        param_dtype=jnp.dtype(numerics.params),
        rngs=rngs,
    )


class Attention(nnx.Module):
    """Causal attention with rotary positions, H / G queries to a key."""

    def __init__(self, config: Config, numerics: Numerics, rngs: nnx.Rngs):
        self.config, self.attention = config, numerics.attention
        width, keys = config.width, config.key_width
        self.q, self.k, self.v, self.o = (
            _linear(config, numerics, width, out, rngs)
            for out in (width, keys, keys, width)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        heads = (*x.shape[:2], -1, self.config.head_size)
        q, k, v = (f(x).reshape(heads) for f in (self.q, self.k, self.v))
        # q (B, T, H, K), k and v (B, T, G, K)
        q, k = (rotate(y, self.config.rope_base) for y in (q, k))
        mixed = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation=self.attention
        )  # (B, T, H, K)
        return self.o(mixed.reshape(x.shape))  # (B, T, D)


def rotate(x: jax.Array, base: float) -> jax.Array:
    """Rotary embedding: pairs (i, i + K/2) turn by position · base^(-2i/K)."""
    tokens, size = x.shape[1], x.shape[3]
    frequency = base ** (-jnp.arange(0, size, 2) / size)  # (K/2,)
    angle = jnp.arange(tokens)[:, None] * frequency  # (T, K/2)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]  # (T, 1, K/2)
    first, second = jnp.split(x, 2, axis=-1)  # (B, T, H, K/2) each
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)  # (B, T, H, K)


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) · up(x))."""

    def __init__(self, config: Config, numerics: Numerics, rngs: nnx.Rngs):
        width, hidden = config.width, config.hidden
        self.gate = _linear(config, numerics, width, hidden, rngs)
        self.up = _linear(config, numerics, width, hidden, rngs)
        self.down = _linear(config, numerics, hidden, width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))  # (B, T, F) inside


class Block(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: Config, numerics: Numerics, rngs: nnx.Rngs):
        self.attn_norm = _norm(config, numerics, rngs)
        self.attn = Attention(config, numerics, rngs)
        self.mlp_norm = _norm(config, numerics, rngs)
        self.mlp = MLP(config, numerics, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.attn_norm(x))  # (B, T, D)
        return x + self.mlp(self.mlp_norm(x))  # (B, T, D)


class LLaMA(nnx.Module):
    """Tokens (B, T) to logits (B, T, V); layer parameters have a leading layer axis."""

    def __init__(
        self,
        config: Config,
        rngs: nnx.Rngs,
        numerics: Numerics = Numerics(),
    ):
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, numerics, rngs)

        self.numerics, self.tied = numerics, config.tied
        self.embed = nnx.Embed(
            config.vocab,
            config.width,
            embedding_init=nnx.initializers.normal(config.init_std),
            dtype=jnp.dtype(numerics.compute),
            param_dtype=jnp.dtype(numerics.params),
            rngs=rngs,
        )
        self.layers = stack(rngs)
        self.norm = _norm(config, numerics, rngs)
        if not config.tied:
            self.lm_head = _linear(config, numerics, config.width, config.vocab, rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        def apply(block: Block, x: jax.Array) -> jax.Array:
            return block(x)

        body = nnx.remat(apply) if self.numerics.remat else apply
        run = nnx.scan(body, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        x = run(self.layers, self.embed(tokens))  # (B, T, D)
        head = self.embed.attend if self.tied else self.lm_head
        return head(self.norm(x))  # (B, T, V)


def parameter_count(params: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(params))
