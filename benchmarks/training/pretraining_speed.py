# SPDX-License-Identifier: Apache-2.0
"""Tokens/s of the methods of `pretraining.py`, in turns within one process."""

import dataclasses
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from benchmarks.training.pretraining_plan import METHODS, Budget, Point

from steps import state_bytes
from train import open_text

BLOCKS = 3  # measured


class Subject:
    """One method, compiled, with the times of its blocks."""

    def __init__(self, name: str, budget: Budget):
        point = Point(name, 0.25, METHODS[name].first[0.25])
        run = METHODS[name].run(budget, point)
        self.program, self.block = run.program(), budget.gap
        self.state = self.program.init(self.program.init_params(0))
        self.update, _ = self.program.compiled(self.state)
        self.state_bytes = state_bytes(self.state.opt_state)
        self.seconds: list[float] = []

    def run(self, batches: Iterator[Any]) -> None:
        placed = [self.program.put(next(batches)) for _ in range(self.block)]
        jax.block_until_ready(placed)
        start = time.perf_counter()
        for batch in placed:
            self.state, _ = self.update(self.state, batch)
        jax.block_until_ready(self.state)
        self.seconds.append(time.perf_counter() - start)


def measure(budget: Budget, names: Iterable[str]) -> dict[str, Any]:
    """Tokens/s of blocks of `gap` steps, so that each holds one refresh, in turns."""
    first = METHODS["AdamW"].run(budget, Point("AdamW", 0.25, -4))
    batches = open_text(dataclasses.replace(first, eval_batches=1)).train
    subjects = {name: Subject(name, budget) for name in names}
    for number in range(BLOCKS + 1):
        for name, subject in subjects.items():
            subject.run(batches)
            print(f"block {number}, {name}: {subject.seconds[-1]:.2f} s", flush=True)
    tokens = budget.gap * budget.batch * budget.tokens
    return {
        name: {
            "tokens_per_second": tokens / statistics.median(subject.seconds[1:]),
            "seconds_per_block": subject.seconds[1:],  # the first compiles
            "state_bytes": subject.state_bytes,
        }
        for name, subject in subjects.items()
    }
