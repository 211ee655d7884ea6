# SPDX-License-Identifier: Apache-2.0
"""Steady step and refresh beside galore-torch, the paper's own package, on CPU.

LLaMA-60M and 130M shapes, f32, rank a quarter of the width, the same gradients; a step
updates the weights in place. Each subject has a process of its own, and they alternate
step by step (`turns.py`). torch has as many threads as there are cores. `torch.optim`'s
AdamW, fused and not, and `optax.adamw` stand beside them. All processes are started
anew several times, since torch's speed differs more between starts than within one.

    python -m benchmarks.speed.against_torch [--sizes 60M 130M] [--quick]

Needs the extra `rivals`, of this or of another environment.
"""

import importlib.util
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.lib import records
from benchmarks.lib.shapes import QUICK, Shapes, gradients, named, turned
from benchmarks.lib.subjects import OURS
from benchmarks.lib.turns import Rival
from benchmarks.speed import rivals, tables

GAP = 5
ROUNDS = 3  # refreshes; the first is cold
STARTS = 3  # of all processes
SIZES = ("60M", "130M")


def missing() -> list[str]:
    """What cannot be run here, and why."""
    wanted = ("torch", "transformers", "bitsandbytes", "galore_torch")
    absent = [name for name in wanted if importlib.util.find_spec(name) is None]
    if not absent:
        return []
    return [f"torch's rows: {', '.join(absent)} not installed (extra 'rivals')"]


def measure(
    shapes: Shapes, rank: int, rounds: int, with_torch: bool
) -> dict[str, dict[str, Any]]:
    names = [*rivals.JAX, *(rivals.TORCH if with_torch else ())]
    started = {name: Rival(rivals.make, name, shapes, rank, GAP) for name in names}
    times: dict[str, dict[str, list[float]]] = {
        name: {"refresh": [], "steady": []} for name in names
    }
    old = gradients(shapes.tree())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gradients.npz"
        for number in range(rounds):
            old = turned(old, gradients(shapes.tree(), 2 + number))
            np.savez(path, **named(jax.tree.map(np.asarray, old)))
            one_round(started, path, times)
    facts = {name: rival("facts") for name, rival in started.items()}
    for rival in started.values():
        rival.close()
    return {name: summary(times[name]) | facts[name] for name in names}


def one_round(
    started: dict[str, Rival], path: Path, times: dict[str, dict[str, list[float]]]
) -> None:
    """A refresh, and steady steps until the next."""
    for rival in started.values():
        rival("load", path)
    for step in range(GAP):
        for name, rival in started.items():
            times[name]["steady" if step else "refresh"].append(rival("step"))


def summary(times: dict[str, list[float]]) -> dict[str, float]:
    """Medians; the first refresh compiles or is cold, and counts apart."""
    steady = statistics.median(times["steady"])
    first, *later = times["refresh"]
    return {
        "steady_seconds": steady,
        "steady_least_seconds": min(times["steady"]),
        "first_refresh_seconds": first - steady,
        "refresh_seconds": statistics.median(later) - steady,
    }


def over_starts(starts: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """By name the medians of all numbers, and the ratios to ours of every start."""
    found: dict[str, Any] = {}
    for name, first in starts[0].items():
        rows = [start[name] for start in starts]
        numbers = (k for k, v in first.items() if isinstance(v, int | float))
        found[name] = first | {
            k: statistics.median(row[k] for row in rows) for k in numbers
        }
        found[name]["steady_over_ours"] = [
            start[name]["steady_seconds"] / start[OURS]["steady_seconds"]
            for start in starts
        ]
    return found


def main() -> None:
    parser = records.parser(__doc__, quick=True)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES)
    arguments = parser.parse_args()
    left_out = missing()
    left_out += [f"{x}: not asked for" for x in SIZES if x not in arguments.sizes]
    sizes = {"quick": QUICK} if arguments.quick else {}
    sizes = sizes or {size: Shapes.load(size) for size in arguments.sizes}
    rounds, starts = (2, 1) if arguments.quick else (ROUNDS, STARTS)
    found = {}
    for size, shapes in sizes.items():
        rank = shapes.width // 4
        results = over_starts(
            [measure(shapes, rank, rounds, not missing()) for _ in range(starts)]
        )
        found[size] = {"rank": rank, "rows": results}
    print(tables.against_torch(found))
    records.write("speed/against_torch", found, left_out, quick=arguments.quick)


if __name__ == "__main__":
    main()
