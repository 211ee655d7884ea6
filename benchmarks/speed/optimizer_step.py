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

from benchmarks.lib import records
from benchmarks.lib.shapes import QUICK, Shapes, gradients, turned, weights
from benchmarks.lib.subjects import ADAMW, GALORE, OURS, THEIRS, Subject, optimizer
from benchmarks.speed import tables

GAP = 5
ROUNDS = 4  # refreshes; the first is cold
QUARTER = 4
NAMES = ADAMW, OURS, GALORE, THEIRS
RANKS = {"60M": (16, 8, QUARTER, 2), "130M": (QUARTER,)}  # width over rank


def formula_bytes(shapes: Shapes, rank: int) -> int:
    """4 (m r + 2 n r) for each matrix, 8 bytes for each other parameter."""
    sides = shapes.matrices().items()
    low = sum(count * (m * rank + 2 * n * rank) for (m, n), count in sides)
    return 4 * low + 8 * shapes.others()


def measure(shapes: Shapes, rank: int, rounds: int = ROUNDS) -> dict[str, Any]:
    tree = shapes.tree()
    params, old = weights(tree), gradients(tree)
    Subject(optax.sgd(1e-3), params)  # start XLA before anyone is timed
    subjects = {name: Subject(optimizer(name, rank, GAP), params) for name in NAMES}
    for number in range(rounds):
        old = turned(old, gradients(tree, 2 + number))
        for step in range(GAP):
            for subject in subjects.values():
                into = subject.steady if step else subject.refreshes
                into.append(subject.seconds(old))
    found = {name: subject.result() for name, subject in subjects.items()}
    return {"rank": rank, "formula_bytes": formula_bytes(shapes, rank)} | found


def main() -> None:
    parser = records.parser(__doc__, quick=True)
    parser.add_argument("--sizes", nargs="+", choices=RANKS, default=list(RANKS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    found: dict[str, Any] = {}
    if arguments.quick:
        found["quick"] = measure(QUICK, QUICK.width // QUARTER, 2)
    for size in () if arguments.quick else arguments.sizes:
        shapes = Shapes.load(size)
        for divisor in RANKS[size]:
            title = size if divisor == QUARTER else f"{size}, rank d/{divisor}"
            found[title] = measure(shapes, shapes.width // divisor)
            print(f"measured {title}", flush=True)
    print(tables.steps(found))
    missing = [f"{size}: not asked for" for size in RANKS if size not in found]
    records.write("speed/optimizer_step", found, missing, quick=arguments.quick)


if __name__ == "__main__":
    main()
