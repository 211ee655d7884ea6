# SPDX-License-Identifier: Apache-2.0
"""One refresh of all of LLaMA-7B's matrices: the default method beside exact SVD.

Each method renews one projector of each shape, f32 (`bases.py`); the model's total is
the sum over its matrices. Gradients have singular values near i^-0.7, which is flatter
than real ones. Each measurement is kept as soon as it ends, and not made again.

    python -m benchmarks.speed.refresh_7b [--model 7b] [--quick]
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.lib import records
from benchmarks.lib.shapes import Shapes
from benchmarks.speed import tables
from benchmarks.speed.bases import Basis

METHODS = {
    "power(), the default": "power",
    "randomized()": "randomized",
    "eigh()": "eigh",
    "svd()": "svd",
}
DEFAULT, EXACT = "power(), the default", "svd()"
Size = tuple[int, int]
Get = Callable[[str, Size], dict[str, Any]]  # what one method takes for one shape


def total(seconds: dict[Size, float], counts: dict[Size, int]) -> float:
    """Over all matrices of a model, of the seconds of one of each shape."""
    return sum(counts[shape] * each for shape, each in seconds.items())


def in_words(seconds: dict[Size, float], counts: dict[Size, int]) -> str:
    return " + ".join(
        f"{counts[m, n]} x {each:.4g} s ({m} x {n})" for (m, n), each in seconds.items()
    )


def whole_model(shapes: Shapes, get: Get) -> dict[str, Any]:
    """Totals of every method, and their ratios to exact SVD."""
    counts = shapes.matrices()
    found = {method: _totals(method, counts, get) for method in METHODS}
    exact = found[EXACT]
    for row in found.values():
        seconds = exact["refresh_seconds"], row["refresh_seconds"]
        row["times_faster_than_svd"] = seconds[0] / seconds[1]
        row["share_of_exact_energy"] = {
            shape: each["captured_energy"] / exact["by_shape"][shape]["captured_energy"]
            for shape, each in row["by_shape"].items()
        }
    return found


def _totals(method: str, counts: dict[Size, int], get: Get) -> dict[str, Any]:
    rows = {shape: get(method, shape) for shape in counts}
    later, first = (
        {shape: row[f"{which}refresh_seconds"] for shape, row in rows.items()}
        for which in ("", "first_")
    )
    return {
        "refresh_seconds": total(later, counts),
        "sum": in_words(later, counts),
        "first_refresh_seconds": total(first, counts),
        "by_shape": {f"{m} x {n}": row for (m, n), row in rows.items()},
    }


def measure(method: str, shape: Size, rank: int) -> dict[str, Any]:
    found = Basis(METHODS[method], shape, rank).measure()
    print(f"{method}, {shape}: {found['refresh_seconds']:.3f} s", flush=True)
    return found | {"captured_energy": found.pop("energy")}


def main() -> None:
    parser = records.parser(__doc__, quick=True)
    parser.add_argument("--model", default="7b")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    model = "60m" if arguments.quick else arguments.model
    shapes, runs = Shapes.load(model), records.Runs("speed/refresh_7b")
    rank, kind = shapes.width // 4, jax.devices()[0].device_kind

    def get(method: str, shape: Size) -> dict[str, Any]:
        if arguments.quick:
            return measure(method, shape, rank)
        m, n = shape
        key = f"{method}, {m} x {n}, rank {rank}, {kind}"
        return runs.get(key, lambda: measure(method, shape, rank))

    result = {"model": model, "rank": rank, "methods": whole_model(shapes, get)}
    print(tables.refresh_7b(result))
    platform = "" if jax.default_backend() == "cpu" else f"_{jax.default_backend()}"
    records.write(f"speed/refresh_{model}{platform}", result, quick=arguments.quick)


if __name__ == "__main__":
    main()
