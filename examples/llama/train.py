# SPDX-License-Identifier: Apache-2.0
"""Trains one model with one optimizer and records what happened."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from tqdm import tqdm

from data import Corpus
from model import Config, LLaMA


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything of a run but the optimizer."""

    model: Config = dataclasses.field(default_factory=Config)
    steps: int = 400
    batch: int = 8
    eval_every: int = 50
    eval_batches: int = 16
    seed: int = 0


@dataclasses.dataclass
class History:
    """What a run leaves behind."""

    train_loss: list[float] = dataclasses.field(default_factory=list)
    eval_steps: list[int] = dataclasses.field(default_factory=list)
    eval_loss: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0  # of training steps, without compilation and evaluation
    tokens: int = 0  # trained on in those seconds
    state_bytes: int = 0

    @property
    def perplexity(self) -> float:
        return math.exp(self.eval_loss[-1])

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def cosine(peak: float, steps: int) -> optax.Schedule:
    """Linear warm-up over a tenth of the steps, cosine decay to a tenth of the peak."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps, peak / 10)


def loss_fn(model: LLaMA, window: jax.Array) -> jax.Array:
    """Mean next-token cross-entropy of windows (B, T + 1), in nats."""
    logits = model(window[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:])
    return losses.mean()


@nnx.jit(donate_argnums=(0, 1))
def train_step(model: LLaMA, optimizer: nnx.Optimizer, window: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(loss_fn)(model, window)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def eval_step(model: LLaMA, window: jax.Array) -> jax.Array:
    return loss_fn(model, window)


def evaluate(model: LLaMA, windows: Any) -> float:
    return float(jnp.mean(jnp.stack([eval_step(model, window) for window in windows])))


def state_bytes(optimizer: nnx.Optimizer) -> int:
    """Bytes of the arrays that the optimizer really holds."""
    leaves = jax.tree.leaves(nnx.as_pure(optimizer.opt_state))
    return sum(leaf.nbytes for leaf in leaves)


def train(
    corpus: Corpus,
    make_optimizer: Callable[[int], optax.GradientTransformation],
    run: Run,
    name: str,
) -> History:
    """Trains a fresh model on the first `run.steps` batches of the seed's order.

    Args:
      corpus: training and validation tokens.
      make_optimizer: from the number of steps to the transformation.
      run: sizes and seed; equal runs see the same tokens from the same initialisation.
      name: shown on the progress bar.

    Returns:
      losses, time and bytes.
    """
    model = LLaMA(run.model, nnx.Rngs(run.seed))
    optimizer = nnx.Optimizer(model, make_optimizer(run.steps), wrt=nnx.Param)
    tokens = run.model.max_tokens
    held_out = corpus.validation_windows(tokens, run.batch, run.eval_batches)
    batches = corpus.windows(tokens, run.batch, run.seed)
    history = History(state_bytes=state_bytes(optimizer))
    bar = tqdm(range(run.steps), desc=name.ljust(14), unit="step")
    for step in bar:
        window = next(batches)
        start = time.perf_counter()
        loss = float(train_step(model, optimizer, window))
        if step:  # the first step compiles
            history.seconds += time.perf_counter() - start
            history.tokens += run.batch * tokens
        history.train_loss.append(loss)
        if (step + 1) % run.eval_every == 0 or step + 1 == run.steps:
            history.eval_steps.append(step + 1)
            history.eval_loss.append(evaluate(model, held_out))
        bar.set_postfix(loss=f"{loss:.3f}")
    return history
