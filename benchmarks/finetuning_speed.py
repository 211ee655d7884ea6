# SPDX-License-Identifier: Apache-2.0
"""Seconds of a fine-tuning step: methods side by side, one step each in turn.

`python benchmarks/finetuning.py --speed`. Rows are random tokens of one length, and the
weights random too: neither changes the time of a step.
"""

import statistics
import time
from typing import Any

import jax
import numpy as np
from flax import nnx

import common

import weights
from batches import Batch
from encoder import Classifier, Config, Inputs
from finetune import Program, State
from recipe import Recipe

ROWS, TOKENS, ROUNDS, GAP = 16, 128, 15, 33
NEVER = 10**6
# GaLore's step without and with new projectors.
METHODS = {
    "AdamW": {"method": "full"},
    "GaLore, rank 4": {"method": "galore", "update_proj_gap": NEVER},
    "GaLore, rank 4, refresh": {"method": "galore", "update_proj_gap": 1},
    "LoRA, rank 4": {"method": "lora"},
}


class Steps:
    """A method's steps on one batch, each timed."""

    def __init__(self, config: Config, options: dict[str, Any], batch: Batch):
        model = Classifier(config, 2, nnx.Rngs(0))
        self.program = Program(model, Recipe(rank=4, **options), steps=1000)
        self.batch, self.key = batch, jax.random.key(0)
        self.state: State = self.program.init()
        self.seconds: list[float] = []

    def run(self) -> None:
        started = time.perf_counter()
        self.state, loss = self.program.update(
            self.state, self.program.frozen, self.batch, self.key
        )
        loss.block_until_ready()
        self.seconds.append(time.perf_counter() - started)

    @property
    def median(self) -> float:
        """Without the first, which compiles and finds GaLore's first projectors."""
        return statistics.median(self.seconds[1:])


def random_batch(config: Config, rows: int, tokens: int) -> Batch:
    words = np.random.default_rng(0).integers(0, config.vocab, (rows, tokens), np.int32)
    lengths = np.full(rows, tokens, np.int32)
    return Batch(Inputs(words, np.zeros_like(words), lengths), np.zeros(rows, np.int32))


def compare(
    config: Config, rows: int = ROWS, tokens: int = TOKENS, rounds: int = ROUNDS
) -> dict[str, Any]:
    """Medians in seconds, and over AdamW's; GaLore's also with a refresh every GAP."""
    batch = random_batch(config, rows, tokens)
    steps = {name: Steps(config, options, batch) for name, options in METHODS.items()}
    for _ in range(rounds + 1):
        for one in steps.values():
            one.run()
    seconds = {name: one.median for name, one in steps.items()}
    steady, refresh = seconds["GaLore, rank 4"], seconds["GaLore, rank 4, refresh"]
    seconds["GaLore, rank 4, on average"] = steady + (refresh - steady) / GAP
    over = {name: value / seconds["AdamW"] for name, value in seconds.items()}
    return {"seconds": seconds, "over_adamw": over}


def measure(model: str) -> None:
    """Compares the methods on an encoder, prints and writes the result."""
    result = compare(weights.fetch(model).config)
    for name, value in result["seconds"].items():
        print(f"{name:28} {value:8.3f} s   {result['over_adamw'][name]:.2f}")
    shape = {"model": model, "rows": ROWS, "tokens": TOKENS, "rounds": ROUNDS}
    common.write("finetuning_speed", shape | {"refresh_every": GAP} | result)
