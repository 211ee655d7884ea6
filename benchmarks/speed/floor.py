# SPDX-License-Identifier: Apache-2.0
"""How far a steady step is from what the machine allows, over layers, width and rank.

Update and `apply_updates` in one program, weights and state donated, f32. The floor is
the projections' FLOPs at the rate that XLA's products reach in caches, and every array
moved once at the bandwidth of a copy (`rates.py`). Both are measured before and after
each point, and the better counts.
The models are whole; the sweeps are of blocks alone, without embedding and head.

    python -m benchmarks.speed.floor [--quick]
"""

import dataclasses
import statistics
import time
import warnings
from typing import Any

from benchmarks.lib import records
from benchmarks.lib.shapes import QUICK, Shapes, gradients, weights
from benchmarks.lib.subjects import ADAMW, OURS, THEIRS, InPlace, optimizer
from benchmarks.speed import curves, rates, tables

STEPS = 15  # timed, fewer where they take long
LEAST = 5
SECONDS = 30.0
NAMES = (ADAMW, OURS, THEIRS)
FAMILY = ("60m", "130m", "350m", "1b", "7b")
DIVISORS = (16, 8, 4, 2)


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement: where it is on which curve."""

    curve: str
    x: int
    shapes: Shapes
    rank: int


def blocks(name: str, layers: int) -> Shapes:
    return dataclasses.replace(Shapes.load(name), layers=layers, vocab=0)


def points() -> list[Point]:
    models = [(name, Shapes.load(name)) for name in ("60m", "130m")]
    found = [Point(f"model {name}", s.width, s, s.width // 4) for name, s in models]
    for layers in (1, 2, 4, 8, 16, 32):
        found.append(Point("layers", layers, blocks("60m", layers), 128))
    for shapes in (blocks(name, 1) for name in FAMILY):
        found.append(Point("width", shapes.width, shapes, shapes.width // 4))
    for name, layers in (("60m", 8), ("7b", 1)):
        shapes = blocks(name, layers)
        for rank in (shapes.width // divisor for divisor in DIVISORS):
            found.append(Point(f"rank, width {shapes.width}", rank, shapes, rank))
    return found


def quick_points() -> list[Point]:
    small = [point for point in points() if point.shapes.width <= 512]
    few = [point for point in small if point.shapes.layers <= 2]
    return [Point("model quick", 256, QUICK, 64), *few]


def measure(point: Point, copied: int, steps: int) -> dict[str, Any]:
    """Seconds of a step by name, floors, and the rates that they come from."""
    shapes = point.shapes
    works = {
        OURS: rates.galore_work(shapes, point.rank),
        ADAMW: rates.adamw_work(shapes),
    }
    before = rates.measure(works[OURS], copied)
    seconds = steady(shapes, point.rank, steps)
    found = before.best(rates.measure(works[OURS], copied))
    floors = {name: found.floor(work) for name, work in works.items()}
    return {
        "curve": point.curve,
        "x": point.x,
        "shapes": dataclasses.asdict(shapes),
        "rank": point.rank,
        "seconds": seconds,
        "floor": floors,
        "ratio": {name: seconds[name] / floors[name] for name in works},
        "flops": works[OURS].flops,
        "bytes": {name: work.bytes for name, work in works.items()},
        "gigaflops": {str(k): v / 1e9 for k, v in found.products.items()},
        "gigabytes_per_second": found.bandwidth / 1e9,
    }


def steady(shapes: Shapes, rank: int, steps: int) -> dict[str, float]:
    """Median seconds of a step without a refresh, in turns."""
    params, grads = weights(shapes.tree()), gradients(shapes.tree())
    subjects = {name: InPlace(optimizer(name, rank), params) for name in NAMES}
    for subject in subjects.values():
        subject.start(grads)
    start, least = time.perf_counter(), min(steps, LEAST)
    for number in range(steps):
        if number >= least and time.perf_counter() - start > SECONDS:
            break
        for subject in subjects.values():
            subject.steady.append(subject.seconds(grads))
    return {name: statistics.median(x.steady) for name, x in subjects.items()}


def main() -> None:
    quick = records.parser(__doc__, quick=True).parse_args().quick
    warnings.simplefilter("ignore", DeprecationWarning)
    copied, steps = (2**27, 5) if quick else (rates.COPIED, STEPS)
    rows = []
    for point in quick_points() if quick else points():
        rows.append(measure(point, copied, steps))
        print(f"measured {point.curve}, {point.x}", flush=True)
    print(tables.floor({"points": rows}))
    if not quick:
        curves.draw_cost(rows, "step_cost")
    records.write("speed/floor", {"points": rows}, quick=quick)


if __name__ == "__main__":
    main()
