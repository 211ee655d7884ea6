# SPDX-License-Identifier: Apache-2.0
"""BERT and MPNet in Flax NNX, and a classifier on top; layers scanned.

    x = norm(word + position + type)
    each layer:  x = norm(x + attention(x));  x = norm(x + down(gelu(up(x))))
    logits = out(tanh(dense(mean of x over the tokens)))

MPNet has no types, counts positions from 2 and adds one learnt number a head and bucket
of distances to all attention scores. Letters in shape comments: B batch, T tokens, N =
B · T, D width, F hidden width of the MLP, H heads, K head size, C classes.

Inside the layers tokens have one axis, N: XLA's CPU backend contracts two axes, as in
the gradient of a kernel or an adapter from (B, T, D), at half the speed of one.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

MAX_DISTANCE = 128  # of MPNet's last bucket
# Our field: the key of Hugging Face's config.json.
KEYS = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "hidden": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "positions": "max_position_embeddings",
    "norm_eps": "layer_norm_eps",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of an encoder, as in a `config.json`."""

    vocab: int
    width: int
    hidden: int  # of the MLP
    layers: int
    heads: int
    positions: int  # rows of their embedding
    norm_eps: float
    first_position: int = 0
    types: int = 2  # of tokens; 0: they have none
    buckets: int = 0  # of relative positions; 0: none
    init_std: float = 0.02
    dropout: float = 0.1  # of embeddings, attention and the outputs of both halves

    @classmethod
    def from_hugging_face(cls, found: dict[str, Any]) -> "Config":
        """From the contents of a `config.json` of BERT or MPNet.

        Raises:
          ValueError: another architecture, or an activation other than gelu.
        """
        kind, activation = found.get("model_type"), found.get("hidden_act")
        if kind not in ("bert", "mpnet") or activation != "gelu":
            raise ValueError(
                f"model_type={kind!r} with hidden_act={activation!r}: only 'bert' and"
                " 'mpnet' with 'gelu' are known."
            )
        fields = {field: found[key] for field, key in KEYS.items()}
        if kind == "bert":
            return cls(**fields, types=found["type_vocab_size"])
        buckets = found["relative_attention_num_buckets"]
        return cls(**fields, first_position=2, types=0, buckets=buckets)

    @property
    def max_tokens(self) -> int:
        return self.positions - self.first_position


class Inputs(NamedTuple):
    """Sequences padded at the end; all int32."""

    tokens: jax.Array  # (B, T)
    types: jax.Array  # (B, T): 1 in the second sentence of a pair
    lengths: jax.Array  # (B,), at least 1

    @property
    def mask(self) -> jax.Array:
        """What is no padding (B, T)."""
        return jnp.arange(self.tokens.shape[1]) < self.lengths[:, None]


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """`x` with a share `rate` zeroed and the rest scaled up; without a key, `x`."""
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)


def split(key: jax.Array | None, count: int) -> Any:
    """Keys, or as many times none."""
    return [None] * count if key is None else jax.random.split(key, count)


def _linear(config: Config, d_in: int, d_out: int, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(config.init_std)
    return nnx.Linear(d_in, d_out, kernel_init=init, rngs=rngs)


def _embed(config: Config, count: int, width: int, rngs: nnx.Rngs) -> nnx.Embed:
    init = nnx.initializers.normal(config.init_std)
    return nnx.Embed(count, width, embedding_init=init, rngs=rngs)


def _norm(config: Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance, a difference of squares, may be off by more than eps, 1e-12.
    return nnx.LayerNorm(
        config.width, epsilon=config.norm_eps, use_fast_variance=False, rngs=rngs
    )


class Embeddings(nnx.Module):
    """Word, position and type, added up and normed: (B, T) to (B, T, D)."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.word = _embed(config, config.vocab, config.width, rngs)
        self.position = _embed(config, config.positions, config.width, rngs)
        if config.types:
            self.type = _embed(config, config.types, config.width, rngs)
        self.norm = _norm(config, rngs)

    def __call__(self, inputs: Inputs, key: jax.Array | None) -> jax.Array:
        positions = self.config.first_position + jnp.arange(inputs.tokens.shape[1])
        x = self.word(inputs.tokens) + self.position(positions)
        if self.config.types:
            x = x + self.type(inputs.types)
        return dropout(self.norm(x), self.config.dropout, key)


class Attention(nnx.Module):
    """Multi-head attention of every token to all that are no padding."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.q, self.k, self.v, self.o = (
            _linear(config, width, width, rngs) for _ in range(4)
        )

    def __call__(
        self, x: jax.Array, bias: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        size = x.shape[-1] // self.config.heads
        heads = (len(bias), -1, self.config.heads, size)
        q, k, v = (f(x).reshape(heads) for f in (self.q, self.k, self.v))  # (B,T,H,K)
        scores = jnp.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
        shares = jax.nn.softmax(scores + bias)  # (B, H, T, T)
        shares = dropout(shares, self.config.dropout, key)
        mixed = jnp.einsum("bhts,bshk->bthk", shares, v)
        return self.o(mixed.reshape(x.shape))  # (N, D)


class MLP(nnx.Module):
    """down(gelu(up(x))), with the exact gelu."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.up = _linear(config, config.width, config.hidden, rngs)
        self.down = _linear(config, config.hidden, config.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.up(x), approximate=False))  # (N, F) inside


class Block(nnx.Module):
    """One post-norm transformer layer."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.attn = Attention(config, rngs)
        self.attn_norm = _norm(config, rngs)
        self.mlp = MLP(config, rngs)
        self.mlp_norm = _norm(config, rngs)

    def __call__(
        self, x: jax.Array, bias: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        keys, rate = split(key, 3), self.config.dropout
        mixed = dropout(self.attn(x, bias, keys[0]), rate, keys[1])
        x = self.attn_norm(x + mixed)  # (N, D)
        return self.mlp_norm(x + dropout(self.mlp(x), rate, keys[2]))  # (N, D)


class Encoder(nnx.Module):
    """Tokens (B, T) to (B, T, D); layer parameters have a leading layer axis."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.config = config
        self.embeddings = Embeddings(config, rngs)
        self.layers = stack(rngs)
        if config.buckets:
            self.relative_bias = _embed(config, config.buckets, config.heads, rngs)

    def __call__(self, inputs: Inputs, key: jax.Array | None = None) -> jax.Array:
        """Without a key no dropout."""
        first, rest = split(key, 2)
        bias = self._bias(inputs)

        def apply(block: Block, x: jax.Array, key: jax.Array | None) -> jax.Array:
            return block(x, bias, key)

        run = nnx.scan(apply, in_axes=(0, nnx.Carry, 0), out_axes=nnx.Carry)
        keys = None if rest is None else jax.random.split(rest, self.config.layers)
        x = self.embeddings(inputs, first)  # (B, T, D)
        return run(self.layers, x.reshape(-1, x.shape[-1]), keys).reshape(x.shape)

    def _bias(self, inputs: Inputs) -> jax.Array:
        """What is added to the scores: (B, 1, 1, T), or (B, H, T, T) for MPNet."""
        padding = jnp.where(inputs.mask, 0.0, -1e9)[:, None, None]
        if not self.config.buckets:
            return padding
        numbers = buckets(inputs.tokens.shape[1], self.config.buckets)  # (T, T)
        return padding + jnp.moveaxis(self.relative_bias(numbers), -1, 0)  # (H, T, T)


def buckets(tokens: int, count: int) -> np.ndarray:
    """The bucket of the distance from each query to each key, int (T, T).

    One half of the buckets is for keys before the query. Of each half, one half holds a
    distance each, the other ones of equal width in log distance (Raffel et al. 2020).
    """
    half, exact = count // 2, count // 4
    distance = np.arange(tokens)[None] - np.arange(tokens)[:, None]  # key - query
    near = np.abs(distance)
    ratio = np.maximum(near, 1).astype(np.float32) / exact
    far = exact + np.log(ratio) / math.log(MAX_DISTANCE / exact) * (half - exact)
    steps = np.where(near < exact, near, np.minimum(far.astype(int), half - 1))
    return steps + half * (distance > 0)


class Classifier(nnx.Module):
    """Sentences or pairs to logits (B, C).

    The head is RoBERTa's, on the mean over tokens: so these encoders were trained.
    """

    def __init__(self, config: Config, classes: int, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs)
        self.head = Head(config, classes, rngs)

    def __call__(self, inputs: Inputs, key: jax.Array | None = None) -> jax.Array:
        """Without a key no dropout."""
        first, last = split(key, 2)
        return self.head(mean(self.encoder(inputs, first), inputs), last)


class Head(nnx.Module):
    """out(tanh(dense(x))), with dropout before both."""

    def __init__(self, config: Config, classes: int, rngs: nnx.Rngs):
        self.rate = config.dropout
        self.dense = _linear(config, config.width, config.width, rngs)
        self.out = _linear(config, config.width, classes, rngs)

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        before, between = split(key, 2)
        x = jnp.tanh(self.dense(dropout(x, self.rate, before)))  # (B, D)
        return self.out(dropout(x, self.rate, between))  # (B, C)


def mean(x: jax.Array, inputs: Inputs) -> jax.Array:
    """Mean of (B, T, D) over the tokens of each sequence: (B, D)."""
    total = jnp.sum(x * inputs.mask[..., None], axis=1)
    return total / inputs.lengths[:, None]
