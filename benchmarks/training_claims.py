# SPDX-License-Identifier: Apache-2.0
"""What `docs/results.md` says of pre-training, in numbers from its record."""

import math
import statistics
from typing import Any

from cells import Load


def _mean(result: Any, name: str) -> float:
    return statistics.mean(result["rows"][name]["losses"])


def size(load: Load) -> list[float]:
    """Millions of parameters, and tokens."""
    row = load("pretraining_1m")["rows"]["AdamW"]
    return [row["parameters"] / 1e6, row["tokens"]]


def control(load: Load) -> list[float]:
    """What training matrices gains AdamW, in nats, and GaLore's share of it."""
    result = load("pretraining_1m")
    none, full = _mean(result, result["control"]), _mean(result, "AdamW")
    return [none - full, 100 * (none - _mean(result, "GaLore")) / (none - full)]


def behind(load: Load) -> list[float]:
    """Perplexities above AdamW's, in per cent."""
    result = load("pretraining_1m")
    names = "GaLore", "LoRA", "ReLoRA", "Low-rank W = BA"
    full = _mean(result, "AdamW")
    return [100 * (math.exp(_mean(result, name) - full) - 1) for name in names]


def ratios(load: Load) -> list[float]:
    """Least losses of seed 0, by method and ratio."""
    rows = load("pretraining_1m")["rows"]
    return [
        min(loss for loss in rows[name]["grid"][f"matrices at {ratio:g}"].values())
        for ratio in (1 / 4, 1 / 16)
        for name in ("AdamW", "GaLore", "LoRA")
    ]


def eight_bits(load: Load) -> list[float]:
    """Mean losses in eight bits less those in f32."""
    result = load("pretraining_1m")
    return [
        _mean(result, f"8-bit {name}") - _mean(result, name)
        for name in ("AdamW", "GaLore")
    ]
