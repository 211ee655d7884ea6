# SPDX-License-Identifier: Apache-2.0
"""Seconds of a fine-tuning step: methods side by side, one step each in turn.

`python -m benchmarks.training.finetuning --speed`. Rows are random tokens of one
length, and the weights random too: neither changes the time of a step.
"""

import statistics
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.lib import records
from benchmarks.lib.subjects import NEVER, timed

import weights
from batches import Batch
from encoder import Classifier, Config, Inputs
from finetune import Program, State
from recipe import Recipe

ROWS, TOKENS, ROUNDS, GAP = 16, 128, 15, 33
RANKS = (4, 8)
REFRESH = ", refresh"  # ends the name of GaLore's step with new projectors


def programs() -> dict[str, dict[str, Any]]:
    """Options by name: the rows of the table, and GaLore's steps with a refresh."""
    found: dict[str, dict[str, Any]] = {"AdamW": {"method": "full"}}
    for rank in RANKS:
        galore, name = {"method": "galore", "rank": rank}, f"GaLore, rank {rank}"
        found[name] = galore | {"update_proj_gap": NEVER}
        found[name + REFRESH] = galore | {"update_proj_gap": 1}
        found[f"LoRA, rank {rank}"] = {"method": "lora", "rank": rank}
    return found


class Steps:
    """A method's steps on one batch, each timed."""

    def __init__(self, config: Config, options: dict[str, Any], batch: Batch):
        model = Classifier(config, 2, nnx.Rngs(0))
        self.program = Program(model, Recipe(**options), steps=1000)
        self.batch, self.key = batch, jax.random.key(0)
        self.state: State = self.program.init()
        self.seconds: list[float] = []

    def run(self) -> None:
        given = self.state, self.program.frozen, self.batch, self.key
        seconds, (self.state, _) = timed(self.program.update, *given)
        self.seconds.append(seconds)


def random_batch(config: Config, rows: int, tokens: int) -> Batch:
    words = np.random.default_rng(0).integers(0, config.vocab, (rows, tokens), np.int32)
    lengths = np.full(rows, tokens, np.int32)
    return Batch(Inputs(words, np.zeros_like(words), lengths), np.zeros(rows, np.int32))


def compare(
    config: Config, rows: int = ROWS, tokens: int = TOKENS, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Median seconds of programs; of rows, with a refresh every GAP steps."""
    batch = random_batch(config, rows, tokens)
    steps = {
        name: Steps(config, options, batch) for name, options in programs().items()
    }
    for _ in range(rounds + 1):
        for one in steps.values():
            one.run()
    # The first compiles, and finds GaLore's first projectors.
    seconds = {k: statistics.median(x.seconds[1:]) for k, x in steps.items()}
    average = {
        name: steady + (seconds.get(name + REFRESH, steady) - steady) / GAP
        for name, steady in seconds.items()
        if not name.endswith(REFRESH)
    }
    over = {name: value / average["AdamW"] for name, value in average.items()}
    return {"seconds": seconds, "on_average": average, "over_adamw": over}


def measure(model: str) -> None:
    """Compares the methods on an encoder, prints and writes the result."""
    result = compare(weights.fetch(model).config)
    print(result["over_adamw"])
    shape = {"model": model, "rows": ROWS, "tokens": TOKENS, "rounds": ROUNDS}
    records.write("training/finetuning_speed", shape | {"refresh_every": GAP} | result)
