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
import optax

import galore_optax
from benchmarks.lib import recording
from benchmarks.lib.subjects import TURN, InPlace, Shapes, gradients, turned, weights
from benchmarks.speed import curves

GAPS = 2
QUICK = Shapes(256, 688, 2, vocab=0)


def transformations(rank: int, gap: int) -> dict[str, optax.GradientTransformation]:
    low = {"rank": rank, "update_proj_gap": gap}
    return {
        "galore_optax": galore_optax.galore(optax.adam(1e-3), **low),
        "galore_optax, stagger=True": galore_optax.galore(
            optax.adam(1e-3), **low, stagger=True
        ),
        "optax.contrib.galore": optax.contrib.galore(1e-3, **low),
    }


def run(shapes: Shapes, rank: int, gap: int) -> dict[str, list[float]]:
    """Seconds of every step from the first of all."""
    params, old, new = weights(shapes), gradients(shapes, 1), gradients(shapes, 2)
    named = transformations(rank, gap).items()
    subjects = {name: InPlace(tx, params) for name, tx in named}
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
    parser = recording.parser(__doc__)
    parser.add_argument("--gap", type=int, default=20)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    quick, gap = arguments.quick, arguments.gap
    shapes = QUICK if quick else Shapes.load("60m")
    rank = shapes.width // 4
    found = {
        name: summary(seconds, gap) for name, seconds in run(shapes, rank, gap).items()
    }
    print(f"{'ms a step':30}{'median':>10}{'mean':>10}{'largest':>10}{'ratio':>8}")
    for name, row in found.items():
        cells = [1e3 * row[f"{x}_seconds"] for x in ("median", "mean", "largest")]
        text = "".join(f"{cell:10.1f}" for cell in cells)
        print(f"{name:30}{text}{row['largest_over_median']:8.2f}")
    if not quick:
        traces = {name: row["seconds"] for name, row in found.items()}
        curves.draw_trace(traces, gap, "step_trace.png")
    recording.write(
        quick, "speed/step_trace", {"gap": gap, "rank": rank, "traces": found}
    )


if __name__ == "__main__":
    main()
