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

from benchmarks.lib import recording
from benchmarks.lib.subjects import Shapes, gradients, turned
from benchmarks.lib.turns import Rival
from benchmarks.speed import rivals

GAP = 5
ROUNDS = 3  # refreshes; the first is cold
STARTS = 3  # of all processes
SIZES = ("60M", "130M")
QUICK = Shapes(256, 688, 2, vocab=0)
OURS = "galore_optax"


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
    old = gradients(shapes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gradients.npz"
        for number in range(rounds):
            old = turned(old, gradients(shapes, 2 + number))
            save(path, old)
            one_round(started, path, times)
    facts = {name: rival("facts") for name, rival in started.items()}
    for rival in started.values():
        rival.close()
    return {name: summary(times[name]) | facts[name] for name in names}


def save(path: Path, tree: Any) -> None:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {
        jax.tree_util.keystr(key, simple=True, separator="/"): np.asarray(leaf)
        for key, leaf in flat
    }
    np.savez(path, **named)


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


def show(size: str, found: dict[str, dict[str, Any]]) -> None:
    ours = found[OURS]
    print(f"\nLLaMA-{size}: seconds, and over ours")
    print(f"{'':24}{'steady step':>20}{'refresh':>20}{'state bytes':>16}")
    for name, row in found.items():
        cells = "".join(
            f"{row[x]:10.3f} ({row[x] / ours[x]:6.2f}x)"
            for x in ("steady_seconds", "refresh_seconds")
        )
        print(f"{name:24}{cells}{row['state_bytes']:>16,}")
    for name, row in found.items():
        ratios = ", ".join(f"{x:.2f}" for x in row["steady_over_ours"])
        print(f"{name:24} steady over ours, start by start: {ratios}")


def main() -> None:
    parser = recording.parser(__doc__)
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
        show(size, results)
        found[size] = {"rank": rank, "rows": results}
    recording.write(arguments.quick, "speed/against_torch", found, left_out)


if __name__ == "__main__":
    main()
