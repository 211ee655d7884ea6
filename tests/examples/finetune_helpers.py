# SPDX-License-Identifier: Apache-2.0
"""Small encoders and their inputs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from encoder import Classifier, Config, Inputs

BERT = Config(
    vocab=50, width=24, hidden=40, layers=2, heads=2, positions=64, norm_eps=1e-12
)
MPNET = dataclasses.replace(BERT, positions=66, first_position=2, types=0, buckets=32)


def inputs(config: Config, lengths: tuple[int, ...], width: int) -> Inputs:
    """Random sequences, the second half of each of type 1 where there are types."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((len(lengths), width), np.int32)
    types = np.zeros_like(tokens)
    for row, length in enumerate(lengths):
        tokens[row, :length] = rng.integers(3, config.vocab, length)
        types[row, length // 2 : length] = config.types > 0
    return Inputs(*map(jnp.asarray, (tokens, types, np.array(lengths, np.int32))))


def classifier(config: Config, std: float = 0.02) -> Classifier:
    """One whose parameters NumPy draws: many small shapes compile slowly."""
    model = nnx.eval_shape(lambda: Classifier(config, 2, nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> jax.Array:
        mean = float(any("scale" in str(part) for part in path))
        return jnp.asarray(rng.normal(mean, std, leaf.shape), jnp.float32)

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(model, jax.tree_util.tree_map_with_path(draw, params))
    return model


LIVELY = 0.3  # with weights so large every part of a model matters


def logits(model: Classifier, batch: Inputs, seed: int | None = None) -> np.ndarray:
    """Compiled once a shape; dropout if there is a seed."""
    graphdef, state = nnx.split(model)
    key = None if seed is None else jax.random.key(seed)
    return np.asarray(_logits(graphdef, state, batch, key))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: Any, state: Any, batch: Inputs, key: Any) -> jax.Array:
    return nnx.merge(graphdef, state)(batch, key)
