# SPDX-License-Identifier: Apache-2.0
"""Runs of the LLaMA example, and what is kept of them."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lib import tuning

import metrics
from settings import Settings
from train import Result, Trainer

Losses = dict[float, float]  # by learning rate


def train(run: Settings, name: str) -> Result:
    """One run, whose files are not kept."""
    with tempfile.TemporaryDirectory() as folder:
        result = Trainer(dataclasses.replace(run, out=Path(folder)), name=name).train()
    print(f"{name}: validation loss {final_loss(result):.4f}", flush=True)
    return result


def final_loss(result: Result) -> float:
    return metrics.series(result.records, "validation_loss")[1][-1]


def kept(result: Result) -> dict[str, Any]:
    """What a table needs."""
    return {
        "loss": final_loss(result),
        "tokens_per_second": result.tokens_per_second,
        "state_bytes": result.state_bytes,
    }


def shown(result: Result) -> dict[str, Any]:
    """What a table and the loss curves need."""
    return {
        "perplexity": result.perplexity,
        "tokens_per_second": result.tokens_per_second,
        "state_bytes": result.state_bytes,
        "records": result.records,
    }


def tuned(start: int, loss: Callable[[float], float]) -> Losses:
    """Losses on a grid of rates 0.01 · 2^k from k = `start`, grown at its edges."""
    found: dict[int, float] = {}
    while wanted := tuning.wanted(found, range(start, start + 3)):
        found |= {k: loss(tuning.rate(k)) for k in wanted}
    return {tuning.rate(k): found[k] for k in sorted(found)}
