# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes an encoder: `python finetune.py [--task rte --method galore --rank 4 ...]`.

    (trained, optimizer state, frozen, batch, key) -> (trained, optimizer state, loss)

Frozen parameters get no gradient and no optimizer state. What is reported is what the
last epoch leaves; no epoch is chosen.
"""

import time
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
from encoder import Classifier
from recipe import Recipe, parse
from shared import Log, adapt, parameter_count, state_bytes


class State(NamedTuple):
    """All that a step changes."""

    params: Any  # those that are trained
    opt_state: Any


class Program:
    """A classifier and an optimizer as pure functions, compiled once a shape."""

    def __init__(self, model: Classifier, recipe: Recipe, steps: int):
        if recipe.method == "lora":
            adapters = nnx.Rngs(recipe.seed + 1)
            adapt(model, recipe.rank, recipe.alpha, in_layers, adapters)

        def is_trained(path: Any, _: Any) -> bool:
            return recipe.trains(tuple(map(str, path)))

        self.graphdef, trained, frozen = nnx.split(
            model, nnx.All(nnx.Param, is_trained), nnx.Param
        )
        self.params, self.frozen = map(nnx.to_pure_dict, (trained, frozen))
        self.tx = recipe.transformation(steps)
        self.update = jax.jit(self._update, donate_argnums=0)
        self.logits = jax.jit(self._logits)

    def init(self) -> State:
        params = jax.tree.map(jnp.copy, self.params)  # a step consumes them
        return State(params, self.tx.init(params))

    def _logits(self, params: Any, frozen: Any, inputs: Any, key: Any = None) -> Any:
        model = nnx.merge(self.graphdef, nnx.State(params), nnx.State(frozen))
        return model(inputs, key)

    def _update(self, state: State, frozen: Any, batch: Batch, key: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(
                cross_entropy(
                    self._logits(params, frozen, batch.inputs, key), batch.labels
                )
            )

        value, gradients = jax.value_and_grad(loss)(state.params)
        updates, opt_state = self.tx.update(gradients, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state), value


cross_entropy = optax.softmax_cross_entropy_with_integer_labels


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

    seen: set[int] = field(default_factory=set)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0  # in those steps, padding included

    def record(self, batch: Batch, seconds: float) -> None:
        size = batch.inputs.tokens.size
        if size in self.seen:
            self.seconds.append(seconds)
            self.tokens += size
        self.seen.add(size)


@dataclass(frozen=True)
class Result:
    """What a run leaves behind."""

    records: list[dict[str, float]]  # one an epoch
    state: State
    trained: int  # parameters
    state_bytes: int  # of the optimizer
    seconds_per_step: float  # without compilation and evaluation
    tokens_per_second: float  # padding included


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


def evaluate(
    program: Program, state: State, rows: Encoded, recipe: Recipe
) -> dict[str, float]:
    """The task's metric and the mean loss in nats, over all rows."""
    labels, found, losses = [], [], []
    for batch in batches.in_order(rows, recipe.rows):
        logits = np.asarray(program.logits(state.params, program.frozen, batch.inputs))
        known = batch.labels != NO_LABEL
        labels.append(batch.labels[known])
        found.append(logits[known].argmax(-1))
        losses.append(np.asarray(cross_entropy(logits[known], batch.labels[known])))
    metric = tasks.find(recipe.task).metric
    score = metric(np.concatenate(labels), np.concatenate(found))
    return {"metric": score, "loss": float(np.mean(np.concatenate(losses)))}


def train(recipe: Recipe, model: Classifier, texts: Texts, quiet: bool = False) -> Result:
    """Every epoch, each followed by an evaluation on `validation` and `dev`."""
    batch = recipe.rows
    steps = recipe.epochs * (len(texts.train.labels) // batch)
    program = Program(model, recipe, steps)
    state, clock = program.init(), Clock()
    rng, key = np.random.default_rng(recipe.seed), jax.random.key(recipe.seed)
    log, step = Log(recipe.out, 0, tensorboard=False), 0
    for epoch in range(1, recipe.epochs + 1):
        losses = []
        for rows in batches.epoch(texts.train, batch, rng):
            started = time.perf_counter()
            state, loss = program.update(
                state, program.frozen, rows, jax.random.fold_in(key, step)
            )
            losses.append(float(loss))
            clock.record(rows, time.perf_counter() - started)
            step += 1
        found = {"epoch": epoch, "train_loss": float(np.mean(losses))}
        for name in ("validation", "dev"):
            part = evaluate(program, state, getattr(texts, name), recipe)
            found |= {f"{name}_{k}": v for k, v in part.items()}
        log.write(step, **found)
        if not quiet:
            print(", ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
    log.close()
    return Result(
        log.records,
        state,
        parameter_count(state.params),
        state_bytes(state.opt_state),
        float(np.mean(clock.seconds)) if clock.seconds else 0.0,
        clock.tokens / sum(clock.seconds) if clock.seconds else 0.0,
    )


def main() -> None:
    recipe = parse()
    try:
        result = train(recipe, *load(recipe))
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{result.trained:,} parameters trained,", end=" ")
    print(f"{result.state_bytes:,} bytes of optimizer state,", end=" ")
    print(f"{result.seconds_per_step:.3f} seconds a step")
    print(f"metrics: {recipe.out}/metrics.jsonl")


if __name__ == "__main__":
    main()
