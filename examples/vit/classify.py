# SPDX-License-Identifier: Apache-2.0
"""Trains a vision transformer on digits: `python classify.py [--method adamw ...]`.

The rule of galore_optax keeps convolutions at full size: it cannot tell which of their
axes make a matrix. Here the patch kernel, the largest leaf of the model, is projected
all the same: one line says that its window and its inputs are read, its outputs made.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from optax.contrib import MuonDimensionNumbers

import galore_optax

import images
from archives import cache_dir
from vit import ViT

# (7, 7, in, out): 49 windows times inputs to outputs.
PATCH = MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
METHODS = ("galore", "adamw")


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run."""

    method: str = "galore"
    """galore, with the patch kernel projected too; or adamw."""
    images: Path | None = None
    """Folder of idx files in MNIST's format; MNIST itself, fetched once, without."""
    width: int = 64
    depth: int = 4
    heads: int = 4
    rank: float = 0.25
    """A share of each matrix' shorter dimension; a whole number from 1 on is a rank."""
    gap: int = 100
    """Steps between refreshes of a projector."""
    learning_rate: float = 0.0
    """At its peak; 0: 1e-3 for adamw, 4e-3 for galore, which scales by 0.25."""
    weight_decay: float = 1e-2
    epochs: int = 3
    batch: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"unknown method={self.method!r}; known: {', '.join(METHODS)}."
            )
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width={self.width} must be a multiple of twice heads={self.heads}."
            )

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """AdamW over a cosine with warm-up, projected or not."""
        galore = self.method == "galore"
        peak = self.learning_rate or (4e-3 if galore else 1e-3)
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
        if not galore:
            return optax.adamw(rate, weight_decay=self.weight_decay)
        return galore_optax.galore_adamw(
            rate,
            weight_decay=self.weight_decay,
            rank=int(self.rank) if self.rank >= 1 else self.rank,
            update_proj_gap=self.gap,
            full_size_rate=0.25,
            weight_dimension_numbers=galore_optax.match_paths({"patch/kernel": PATCH}),
        )


@nnx.jit
def train_step(
    model: ViT, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array
) -> jax.Array:
    """One step on (B, 28, 28, 1) and (B,); the mean loss."""

    def loss(model: ViT) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(model(x), y)
        return jnp.mean(losses)

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


@nnx.jit
def hits(model: ViT, x: jax.Array, y: jax.Array) -> jax.Array:
    """How many are classified correctly."""
    return jnp.sum(jnp.argmax(model(x), axis=-1) == y)


def train(run: Run) -> dict[str, Any]:
    """A run: the mean loss and the test accuracy of each epoch, bytes of state."""
    training, test = images.load(run.images, cache_dir() / "archives")
    steps = run.epochs * (len(training) // run.batch)
    if not steps:
        raise ValueError(
            f"{len(training)} images make no batch of {run.batch}. Take a smaller one."
        )
    model = ViT(run.width, run.depth, run.heads, nnx.Rngs(run.seed))
    tx = run.transformation(steps)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    if run.method == "galore":
        print(galore_optax.describe(tx, nnx.state(model, nnx.Param)))
    losses, accuracies = [], []
    for epoch in range(run.epochs):
        batches = training.epoch(run.batch, run.seed + epoch)
        found = [train_step(model, optimizer, x, y) for x, y in batches]
        right = [int(hits(model, x, y)) for x, y in test.in_order(run.batch)]
        losses.append(float(np.mean(jax.device_get(found))))
        accuracies.append(sum(right) / len(test))
        print(f"epoch {epoch + 1}: loss {losses[-1]:.4f}, test {accuracies[-1]:.2%}")
    state = sum(x.nbytes for x in jax.tree.leaves(nnx.state(optimizer, nnx.OptState)))
    print(f"{state:,} bytes of optimizer state")
    return {"loss": losses, "accuracy": accuracies, "state_bytes": state}


def main() -> None:
    try:
        train(tyro.cli(Run))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
