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

from benchmarks.lib import recording
from benchmarks.lib.subjects import InPlace, Shapes, gradients, optimizers, weights
from benchmarks.speed import curves, rates

STEPS = 15  # timed, fewer where they take long
LEAST = 5
SECONDS = 30.0
OURS, ADAMW, THEIRS = "galore_optax", "optax.adamw", "optax.contrib.galore"
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
    found = [Point("model quick", 256, Shapes(256, 688, 2, vocab=0), 64)]
    for layers in (1, 2, 4):
        found.append(Point("layers", layers, blocks("60m", layers), 128))
    for shapes in (blocks(name, 1) for name in FAMILY[:2]):
        found.append(Point("width", shapes.width, shapes, shapes.width // 4))
    for rank in (32, 128):
        found.append(Point("rank, width 512", rank, blocks("60m", 1), rank))
    return found


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
    params, grads = weights(shapes), gradients(shapes)
    made = optimizers(rank, 10**6)
    subjects = {name: InPlace(made[name], params) for name in NAMES}
    for subject in subjects.values():
        subject.skip_first_refresh()
        subject.step(grads)
    start, least = time.perf_counter(), min(steps, LEAST)
    for number in range(steps):
        if number >= least and time.perf_counter() - start > SECONDS:
            break
        for subject in subjects.values():
            subject.steady.append(subject.seconds(grads))
    return {name: statistics.median(x.steady) for name, x in subjects.items()}


def line(row: dict[str, Any]) -> str:
    cells = [f"{1e3 * row['seconds'][name]:9.2f}" for name in NAMES]
    floors = [f"{1e3 * row['floor'][name]:9.2f}" for name in (ADAMW, OURS)]
    ratios = [f"{row['ratio'][name]:6.2f}" for name in (ADAMW, OURS)]
    title = f"{row['curve']}, {row['x']}"
    return f"{title:22}{''.join(cells)} {''.join(floors)} {''.join(ratios)}"


def main() -> None:
    arguments = recording.parser(__doc__).parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    quick = arguments.quick
    print(f"{'ms a step':22}{'adamw':>9}{'galore':>9}{'contrib':>9}", end=" ")
    print(f"{'floor of':>9}{'those':>9} {'ratio':>6}{'':>6}")
    rows = []
    for point in quick_points() if quick else points():
        copied, steps = (2**27, 5) if quick else (rates.COPIED, STEPS)
        rows.append(measure(point, copied, steps))
        print(line(rows[-1]), flush=True)
    if not quick:
        curves.draw_cost(rows, "step_cost.png")
    recording.write(quick, "speed/floor", {"points": rows})


if __name__ == "__main__":
    main()
