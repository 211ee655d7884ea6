# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes an encoder: `python finetune.py [--task rte --method galore ...]`.

    (trained, optimizer state, frozen, batch, key) -> (trained, optimizer state, loss)

Frozen parameters get no gradient and no optimizer state. What is reported is what the
last epoch leaves; no epoch is chosen.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import batches
import tasks
import weights
from batches import NO_LABEL, Batch, Encoded
from encoder import Classifier, Inputs
from recipe import Recipe, parse
from shared import Log, adapt, parameter_count, state_bytes

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class State(NamedTuple):
    """All that a step changes."""

    params: Any  # those that are trained
    opt_state: Any


class Program:
    """A classifier and an optimizer as pure functions, compiled once a shape."""

    def __init__(self, model: Classifier, recipe: Recipe, steps: int):
        if recipe.method == "lora":
            adapters = nnx.Rngs(recipe.seed)
            adapt(model, recipe.rank, recipe.alpha, in_layers, adapters)
        trained = nnx.All(nnx.Param, lambda path, _: recipe.trains(names(path)))
        self.graphdef, *states = nnx.split(model, trained, nnx.Param)
        self.params, self.frozen = map(nnx.to_pure_dict, states)
        self.tx = recipe.transformation(steps)
        self.update = jax.jit(self._update, donate_argnums=0)
        self.logits = jax.jit(self._logits)

    def init(self) -> State:
        params = jax.tree.map(jnp.copy, self.params)  # a step consumes them
        return State(params, self.tx.init(params))

    def _logits(
        self, params: Any, frozen: Any, inputs: Inputs, key: Any = None
    ) -> jax.Array:
        """(B, C); without a key no dropout."""
        model = nnx.merge(self.graphdef, nnx.State(params), nnx.State(frozen))
        return model(inputs, key)

    def _update(
        self, state: State, frozen: Any, batch: Batch, key: jax.Array
    ) -> tuple[State, jax.Array]:
        def mean_loss(params: Any) -> jax.Array:
            logits = self._logits(params, frozen, batch.inputs, key)
            return cross_entropy(logits, batch.labels).mean()

        loss, gradients = jax.value_and_grad(mean_loss)(state.params)
        updates, opt_state = self.tx.update(gradients, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state), loss


def names(path: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(map(str, path))


def in_layers(path: tuple[str, ...]) -> bool:
    """Which linear maps are adapted: those that GaLore projects."""
    return "layers" in path


@dataclass(frozen=True)
class Texts:
    """The parts of a task as numbers."""

    train: Encoded
    validation: Encoded
    dev: Encoded


@dataclass
class Clock:
    """Seconds of the steps whose shape was compiled before."""

    shapes: set[tuple[int, ...]] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)

    def record(self, batch: Batch, seconds: float) -> None:
        shape = batch.inputs.tokens.shape
        if shape in self.shapes:
            self.seconds.append(seconds)
        self.shapes.add(shape)

    @property
    def mean(self) -> float:
        return float(np.mean(self.seconds)) if self.seconds else 0.0


@dataclass(frozen=True)
class Result:
    """What a run leaves behind, besides its file."""

    records: list[dict[str, float]]  # one an epoch
    state: State
    trained: int  # parameters
    state_bytes: int  # of the optimizer
    seconds_per_step: float  # without compilation and evaluation


def load(recipe: Recipe) -> tuple[Classifier, Texts]:
    """The encoder with a new head, and the rows.

    Raises:
      ValueError, FileNotFoundError, RuntimeError: as `tasks.load` and `weights.fetch`.
    """
    data = tasks.load(recipe.task, recipe.glue_dir)
    found = weights.fetch(recipe.model)
    if recipe.longest > found.config.max_tokens:
        raise ValueError(
            f"tokens={recipe.longest} is more than the {found.config.max_tokens} that"
            f" model {recipe.model!r} is made for."
        )
    classes = len(tasks.find(recipe.task).labels)
    model = Classifier(found.config, classes, nnx.Rngs(recipe.seed))
    weights.put(model.encoder, found.tensors)
    parts = (batches.encode(found.tokenizer, rows, recipe.longest) for rows in data)
    return model, Texts(*parts)


class Trainer:
    """A run, from a pre-trained encoder to its last epoch."""

    def __init__(self, recipe: Recipe, model: Classifier, texts: Texts):
        self.recipe, self.texts = recipe, texts
        self.steps = recipe.steps_an_epoch(len(texts.train.labels))
        self.program = Program(model, recipe, recipe.epochs * self.steps)
        self.state, self.step = self.program.init(), 0
        self.clock, self.log = Clock(), Log(recipe.out, 0, tensorboard=False)
        self.rows = np.random.default_rng(recipe.seed)
        self.key = jax.random.key(recipe.seed)

    def train(self) -> Result:
        """Every epoch, each with an evaluation after it."""
        for epoch in range(1, self.recipe.epochs + 1):
            losses = [self._update(batch) for batch in self._epoch()]
            found = {"epoch": epoch, "train_loss": float(np.mean(losses))}
            for name in ("validation", "dev"):
                part = self.evaluate(getattr(self.texts, name))
                found |= {f"{name}_{key}": value for key, value in part.items()}
            self.log.write(self.step, **found)
            print(", ".join(f"{key} {value:.4g}" for key, value in found.items()))
        self.log.close()
        return Result(
            self.log.records,
            self.state,
            parameter_count(self.state.params),
            state_bytes(self.state.opt_state),
            self.clock.mean,
        )

    def _epoch(self) -> Iterator[Batch]:
        found = batches.epoch(self.texts.train, self.recipe.rows, self.rows)
        return itertools.islice(found, self.steps)

    def _update(self, batch: Batch) -> float:
        started = time.perf_counter()
        key = jax.random.fold_in(self.key, self.step)
        self.state, loss = self.program.update(
            self.state, self.program.frozen, batch, key
        )
        found = float(loss)  # waits
        self.clock.record(batch, time.perf_counter() - started)
        self.step += 1
        return found

    def evaluate(self, rows: Encoded) -> dict[str, float]:
        """The task's metric and the mean loss in nats, over all rows."""
        parts = [self._logits(b) for b in batches.in_order(rows, self.recipe.rows)]
        logits, labels = (np.concatenate(x) for x in zip(*parts, strict=True))
        known = labels != NO_LABEL
        logits, labels = logits[known], labels[known]
        score = tasks.find(self.recipe.task).metric(labels, logits.argmax(-1))
        return {"metric": score, "loss": float(cross_entropy(logits, labels).mean())}

    def _logits(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        found = self.program.logits(
            self.state.params, self.program.frozen, batch.inputs
        )
        return np.asarray(found), batch.labels


def main() -> None:
    recipe = parse()
    try:
        result = Trainer(recipe, *load(recipe)).train()
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{result.trained:,} parameters trained,", end=" ")
    print(f"{result.state_bytes:,} bytes of optimizer state,", end=" ")
    print(f"{result.seconds_per_step:.3f} seconds a step")
    print(f"metrics: {recipe.out}/metrics.jsonl")


if __name__ == "__main__":
    main()
