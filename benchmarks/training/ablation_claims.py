# SPDX-License-Identifier: Apache-2.0
"""What `docs/results.md` says of settings, in numbers from the record."""

from typing import Any

from benchmarks.lib.cells import Load
from benchmarks.lib.claim import RESULTS, Claim


def _mean(load: Load, study: str, name: str) -> float:
    rows = load("training/ablations")["studies"][study]
    return next(row["mean"] for row in rows if row["name"] == name)


def _on_grid(load: Load, rank: int, gap: Any) -> float:
    return _mean(load, load("training/ablations")["grid"], f"rank={rank}, gap={gap}")


def every_step(load: Load) -> list[float]:
    """What a refresh a step costs against the best gap, and its interval."""
    found = load("training/ablations")["figure_5"]["32"]["too_frequent"]
    return [found[key] for key in ("mean", "low", "high")]


def never(load: Load) -> list[float]:
    """What no refresh but the first costs against the best gap, over three ranks."""
    found = load("training/ablations")["figure_5"]
    costs = [found[rank]["too_rare"]["mean"] for rank in ("8", "16", "32")]
    return [min(costs), max(costs)]


def quarter_of_the_rank(load: Load) -> list[float]:
    return [_on_grid(load, 8, 50) - _on_grid(load, 32, 50)]


def slower(load: Load) -> list[float]:
    """Rank 64 at the whole rate and at half of it; rank 32 likewise."""
    half = [_mean(load, "learning rate", f"half, rank {rank}") for rank in (64, 32)]
    whole = [_on_grid(load, rank, 50) for rank in (64, 32)]
    return [whole[0], half[0], whole[1], half[1]]


def vmapped(load: Load) -> list[float]:
    return [load("training/ablations")["seconds_a_step"]["ratio"]]


CLAIMS = [
    Claim(
        RESULTS,
        "a refresh at every step costs {:.3f} nats against one every ten ({:.3f} to"
        " {:.3f}), and none after the first {:.3f} to {:.3f} at ranks 8 to 32.",
        lambda load: [*every_step(load), *never(load)],
    ),
    Claim(
        RESULTS,
        "a quarter of the rank costs {:.3f} nats at the usual gap",
        quarter_of_the_rank,
    ),
    Claim(
        RESULTS,
        "Rank 64 ends at {:.2f} at this rate and at {:.2f} at half of it, rank 32 at"
        " {:.2f} and {:.2f}",
        slower,
    ),
    Claim(
        RESULTS,
        "a step of three seeds at once takes {:.2f} times as long as three steps",
        vmapped,
    ),
]
