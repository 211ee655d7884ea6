# SPDX-License-Identifier: Apache-2.0
"""Trains a small LLaMA from several seeds at once: one program, vmapped over seeds.

    lane = (initialisation, order of the data, key of the projectors) of one seed
    (states of all lanes, batches (S, 1, B, T + 1), gap) -> states of all lanes

`update_proj_gap` is traced, so that settings which differ in it share a program.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import data
import demo
import optimizers
from model import Config, Numerics
from steps import Program, State

NEVER = 2**30  # a gap that no run is as long as


@dataclasses.dataclass(frozen=True)
class Setting:
    """What runs may differ in; `options` are those of the optimizer."""

    rank: int
    gap: int = demo.GAP
    optimizer: str = "galore_adamw"
    options: tuple[tuple[str, Any], ...] = ()
    rate: float = 1.0  # times the recipe's

    def __str__(self) -> str:
        gap = "never" if self.gap >= NEVER else self.gap
        options = [f"{name}={value}" for name, value in self.options]
        options += [] if self.rate == 1 else [f"rate x {self.rate:g}"]
        name = [] if self.optimizer == "galore_adamw" else [self.optimizer]
        return ", ".join([*name, f"rank={self.rank}", f"gap={gap}", *options])

    def transformation(
        self, rate: optax.Schedule, gap: Any, seed: Any
    ) -> optax.GradientTransformation:
        """Clipping and the optimizer, as the demo has them."""
        options = {"rank": self.rank, "weight_decay": 0.01} | dict(self.options)
        options |= {"update_proj_gap": gap, "seed": seed}
        tx = optimizers.make(self.optimizer, rate, options)
        return optax.chain(optax.clip_by_global_norm(demo.GALORE.clip), tx)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What all runs have in common."""

    config: Config
    steps: int
    seeds: int
    batch: int = demo.GALORE.batch
    tokens: int = demo.GALORE.tokens
    eval_batches: int = 32
    learning_rate: float = 0.02

    def rate(self, factor: float) -> optax.Schedule:
        told = {"steps": self.steps, "learning_rate": factor * self.learning_rate}
        return dataclasses.replace(demo.GALORE, **told).schedule()


def program(recipe: Recipe, setting: Setting, gap: Any, seed: Any = 0) -> Program:
    tx = setting.transformation(recipe.rate(setting.rate), gap, seed)
    return Program(recipe.config, Numerics(), tx, accumulation=1, mesh=None)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Compiled functions over all seeds of one setting, whatever its gap."""

    init: Callable[[jax.Array], State]
    update: Callable[[State, np.ndarray, int], tuple[State, Any]]
    loss: Callable[[Any, np.ndarray], tuple[jax.Array, jax.Array]]


def lane(recipe: Recipe, setting: Setting) -> Lanes:
    """The functions of a single seed, not compiled."""

    def init(seed: jax.Array) -> State:
        one = program(recipe, setting, demo.GAP, seed)
        # nnx makes this key of an int itself, but not of a traced one.
        return one.init(one.init_params(jax.random.key(seed)))

    def update(state: State, parts: jax.Array, gap: jax.Array) -> tuple[State, Any]:
        return program(recipe, setting, gap).update(state, parts)

    def loss(params: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        return program(recipe, setting, demo.GAP).loss(params, batch)

    return Lanes(init, update, loss)


def lanes(recipe: Recipe, setting: Setting) -> Lanes:
    return _lanes(recipe, dataclasses.replace(setting, gap=demo.GAP))


@functools.cache
def _lanes(recipe: Recipe, setting: Setting) -> Lanes:
    one = lane(recipe, setting)
    return Lanes(
        jax.jit(jax.vmap(one.init)),
        jax.jit(jax.vmap(one.update, in_axes=(0, 0, None)), donate_argnums=0),
        jax.jit(jax.vmap(one.loss, in_axes=(0, None))),
    )


class Batches:
    """Training batches of all seeds, (S, 1, B, T + 1)."""

    def __init__(self, recipe: Recipe, corpus: data.Corpus):
        shape = recipe.tokens, recipe.batch
        self.streams = [corpus.batches(*shape, seed) for seed in range(recipe.seeds)]

    def __next__(self) -> np.ndarray:
        return np.stack([next(stream)[None] for stream in self.streams])


def train(recipe: Recipe, setting: Setting, corpus: data.Corpus) -> dict[str, Any]:
    """Final validation loss of every seed, and what the run took."""
    compiled, batches = lanes(recipe, setting), Batches(recipe, corpus)
    states, gap = compiled.init(jnp.arange(recipe.seeds)), jnp.int32(setting.gap)
    size = sum(x.nbytes for x in jax.tree.leaves(states.opt_state))
    times = [time.perf_counter()]
    for _ in range(recipe.steps):
        states, found = compiled.update(states, next(batches), gap)
        jax.block_until_ready(found)
        times.append(time.perf_counter())
    return {
        "losses": evaluate(recipe, compiled, states, corpus),
        "state_bytes_a_seed": size // recipe.seeds,
        "seconds": time.perf_counter() - times[0],
        "seconds_a_step": float(np.median(np.diff(times))),
    }


def evaluate(
    recipe: Recipe, compiled: Lanes, states: State, corpus: data.Corpus
) -> list[float]:
    """Mean cross-entropy of every seed on the same held-out batches, nats a token."""
    shape = recipe.tokens, recipe.batch, recipe.eval_batches
    found = [
        compiled.loss(states.params, batch)
        for batch in corpus.validation_batches(*shape)
    ]
    totals, counts = np.sum(np.array(found, np.float64), axis=0)  # (S,) each
    return [float(loss) for loss in totals / counts]


def seconds_a_step(
    recipe: Recipe, setting: Setting, corpus: data.Corpus, rounds: int
) -> dict[str, float]:
    """A vmapped step against as many single steps as it has lanes, taken in turns."""
    many, one = lanes(recipe, setting), lane(recipe, setting)
    single = jax.jit(one.update, donate_argnums=0)
    states = many.init(jnp.arange(recipe.seeds))
    alone = [jax.tree.map(lambda x, i=i: x[i], states) for i in range(recipe.seeds)]
    batches, gap, times = Batches(recipe, corpus), jnp.int32(NEVER), []
    for _ in range(rounds):
        batch, start = next(batches), time.perf_counter()
        states, found = many.update(states, batch, gap)
        jax.block_until_ready(found)
        half = time.perf_counter()
        for i in range(recipe.seeds):
            alone[i], found = single(alone[i], batch[i], gap)
            jax.block_until_ready(found)
        times.append((half - start, time.perf_counter() - half))
    # The first round compiles.
    vmapped, in_turn = np.median(times[1:], axis=0)
    return {
        "vmapped": float(vmapped),
        "one_after_the_other": float(in_turn),
        "ratio": float(vmapped / in_turn),
    }
