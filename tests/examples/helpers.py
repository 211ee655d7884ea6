# SPDX-License-Identifier: Apache-2.0
"""A run of a tiny model on files in C4's format."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from settings import Settings
from train import Trainer

LLAMA = Path(__file__).resolve().parents[2] / "examples" / "llama"

RUN = {
    "corpus": "c4",
    "steps": 8,
    "batch": 4,
    "tokens": 32,
    "optimizer": "galore_adamw",
    "options": ("rank=4", "update_proj_gap=3"),
    "eval_every": 4,
    "eval_batches": 2,
    "log_every": 1,
}


def tiny(files: Path, out: Path, **changes: Any) -> Settings:
    paths = {
        "model": str(files / "tiny.json"),
        "c4_files": str(files),
        "tokenizer": str(files / "tokenizer.json"),
    }
    return Settings(**(RUN | paths | {"out": out} | changes))


def assert_same_bits(one: Any, two: Any) -> None:
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
    for number, (a, b) in enumerate(leaves):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), f"leaf {number}")


@contextlib.contextmanager
def opened(run: Settings) -> Iterator[Trainer]:
    """A run as it stands, without a further step."""
    trainer = Trainer(run)
    try:
        yield trainer
    finally:
        trainer.close()


def stop_after(trainer: Trainer, last: int) -> Any:
    """Stops at the step after the one that was saved."""
    pauses = trainer._pauses

    def stop(step: int) -> bool:
        if step == last + 1:
            raise KeyboardInterrupt
        return pauses(step)

    return stop
