# SPDX-License-Identifier: Apache-2.0
"""The time of every step over two gaps: plain, staggered, and optax.contrib's.

LLaMA-60M shapes, f32, rank 128. The gradient turns a little at every step. Every
projector is found at the first step of all, which is timed apart; the trace begins with
the next gap. The three run in turns.

    python -m benchmarks.speed.step_trace [--gap 20] [--quick]
"""

import statistics
import warnings
from typing import Any

import jax.numpy as jnp

from benchmarks.lib import records
from benchmarks.lib.shapes import QUICK, TURN, Shapes, gradients, turned, weights
from benchmarks.lib.subjects import OURS, THEIRS, InPlace, optimizer
from benchmarks.speed import curves, tables

GAPS = 2
NAMES = OURS, f"{OURS}, stagger=True", THEIRS


def run(shapes: Shapes, rank: int, gap: int) -> dict[str, list[float]]:
    """Seconds of every step from the first of all."""
    tree = shapes.tree()
    params, old, new = weights(tree), gradients(tree, 1), gradients(tree, 2)
    subjects = {name: InPlace(optimizer(name, rank, gap), params) for name in NAMES}
    for step in range((GAPS + 1) * gap):
        now = turned(old, new, jnp.float32(TURN * step / gap))
        for subject in subjects.values():
            subject.steady.append(subject.seconds(now))
    return {name: subject.steady for name, subject in subjects.items()}


def summary(seconds: list[float], gap: int) -> dict[str, Any]:
    """The trace without its first gap, and how far its largest step stands out."""
    trace = seconds[gap:]
    median = statistics.median(trace)
    return {
        "first_seconds": seconds[0],
        "median_seconds": median,
        "largest_seconds": max(trace),
        "largest_over_median": max(trace) / median,
        "mean_seconds": statistics.mean(trace),
        "seconds": trace,
    }


def main() -> None:
    parser = records.parser(__doc__, quick=True)
    parser.add_argument("--gap", type=int, default=20)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    quick, gap = arguments.quick, arguments.gap
    shapes = QUICK if quick else Shapes.load("60m")
    rank = shapes.width // 4
    traces = {k: summary(v, gap) for k, v in run(shapes, rank, gap).items()}
    found = {"gap": gap, "rank": rank, "traces": traces}
    print(tables.step_trace(found))
    if not quick:
        curves.draw_trace(found, "step_trace")
    records.write("speed/step_trace", found, quick=quick)


if __name__ == "__main__":
    main()
