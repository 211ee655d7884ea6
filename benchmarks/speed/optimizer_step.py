# SPDX-License-Identifier: Apache-2.0
"""Step, refresh and compile time beside `optax.adamw` and `optax.contrib.galore`.

LLaMA-60M and 130M shapes, f32, one leaf a matrix, rank a quarter of the width, for 60M
other ranks too. All run in turns within one process, so that noise of the machine meets
all alike. Gradients have decaying spectra, and turn between refreshes.

    python -m benchmarks.speed.optimizer_step [--sizes 60M 130M] [--quick]
"""

import warnings
from typing import Any

import optax

from benchmarks.lib import recording
from benchmarks.lib.subjects import (
    Shapes,
    Subject,
    gradients,
    optimizers,
    turned,
    weights,
)

GAP = 5
ROUNDS = 4  # refreshes; the first is cold
QUARTER = 4
RANKS = {"60M": (16, 8, QUARTER, 2), "130M": (QUARTER,)}  # width over rank
QUICK = Shapes(256, 688, 2, vocab=0)


def formula_bytes(shapes: Shapes, rank: int) -> int:
    """4 (m r + 2 n r) for each matrix, 8 bytes for each other parameter, counters."""
    sides = shapes.matrices().items()
    low = sum(count * (m * rank + 2 * n * rank) for (m, n), count in sides)
    counters = 4 + 8 + 4 + 8 * sum(count for _, count in sides)
    return 4 * low + 8 * shapes.others() + counters


def measure(shapes: Shapes, rank: int, rounds: int = ROUNDS) -> dict[str, Any]:
    params, old = weights(shapes), gradients(shapes)
    Subject(optax.sgd(1e-3), params)  # start XLA before anyone is timed
    named = optimizers(rank, GAP).items()
    subjects = {name: Subject(tx, params) for name, tx in named}
    for number in range(rounds):
        old = turned(old, gradients(shapes, 2 + number))
        for step in range(GAP):
            for subject in subjects.values():
                into = subject.steady if step else subject.refreshes
                into.append(subject.seconds(old))
    return {name: subject.result() for name, subject in subjects.items()}


def show(title: str, results: dict[str, Any]) -> None:
    theirs = results["optax.contrib.galore"]
    print(f"\nLLaMA-{title}: seconds, and contrib's over ours")
    columns = ("compile_seconds", "steady_seconds", "refresh_seconds")
    print(
        f"{'':22}{'compile':>16}{'steady step':>16}{'refresh':>18}{'state bytes':>16}"
    )
    for name, row in results.items():
        cells = [f"{row[c]:8.3f} ({theirs[c] / row[c]:5.2f}x)" for c in columns]
        print(f"{name:22}{'  '.join(cells)}{row['state_bytes']:>16,}")


def run(title: str, shapes: Shapes, rank: int, rounds: int = ROUNDS) -> dict[str, Any]:
    results = measure(shapes, rank, rounds)
    show(title, results)
    expected = formula_bytes(shapes, rank)
    print(f"state by the formula: {expected:,} bytes", flush=True)
    return {"rank": rank, "formula_bytes": expected, **results}


def main() -> None:
    parser = recording.parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=RANKS, default=list(RANKS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    if arguments.quick:
        run("quick", QUICK, QUICK.width // QUARTER, 2)
        return
    found, missing = {}, [f"{size}: not asked for" for size in RANKS]
    for size in arguments.sizes:
        missing.remove(f"{size}: not asked for")
        shapes = Shapes.load(size)
        for divisor in RANKS[size]:
            title = size if divisor == QUARTER else f"{size}, rank d/{divisor}"
            found[title] = run(title, shapes, shapes.width // divisor)
    recording.write(False, "speed/optimizer_step", found, missing)


if __name__ == "__main__":
    main()
