# SPDX-License-Identifier: Apache-2.0
"""One refresh of all of LLaMA-7B's matrices: the default method beside exact SVD.

Each method renews one projector of each shape, by the library's own update:

    seconds of a refresh = update(..., refresh=True) - update(..., refresh=False)

of a filter, an optimizer without moments; the model's total is the sum over its
matrices, which is printed. Gradients are f32, with singular values near i^-0.7, which
is flatter than real ones, and have turned (0.8 old + 0.6 new) since the refresh before.
Each measurement is kept as soon as it ends, and not made again.

    python -m benchmarks.speed.refresh_7b [--model 7b] [--divisor 4] [--quick]
"""

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import optax

import galore_optax
from benchmarks.lib import common, recording
from benchmarks.lib.subjects import Shapes, gradient, turned
from galore_optax import subspace

METHODS: dict[str, subspace.Subspace] = {
    "power(), the default": subspace.power(),
    "randomized()": subspace.randomized(),
    "eigh()": subspace.eigh(),
    "svd()": subspace.svd(),
}
DEFAULT, EXACT = "power(), the default", "svd()"
SECONDS = 20.0  # a measurement is repeated until it has taken so long
MOST = 5  # and so often at most


@dataclasses.dataclass(frozen=True)
class Problem:
    """One matrix, whose projector is renewed by one method."""

    method: str
    shape: tuple[int, int]
    rank: int

    @property
    def key(self) -> str:
        m, n = self.shape
        kind = jax.devices()[0].device_kind
        return f"{self.method}, {m} x {n}, rank {self.rank}, {kind}"


def measure(problem: Problem) -> dict[str, Any]:
    """Seconds of the first refresh, of later ones, and of compiling; energy."""
    tx = galore_optax.galore(
        optax.identity(), rank=problem.rank, subspace=METHODS[problem.method]
    )
    one, two = (
        {"kernel": gradient(jax.random.key(seed), problem.shape)} for seed in (1, 2)
    )
    start = time.perf_counter()
    renew, keep = (_compiled(tx, one, refresh) for refresh in (True, False))
    compile_seconds = time.perf_counter() - start
    state = tx.init(one)
    steady, _ = _median(lambda: keep(one, state))
    cold, state = _timed(lambda: renew(one, state))
    now = turned(one, two)
    warm, after = _median(lambda: renew(now, state))
    energy = galore_optax.captured_energy(tx, after, now)
    return {
        "compile_seconds": compile_seconds,
        "steady_seconds": steady,
        "first_refresh_seconds": cold - steady,
        "refresh_seconds": warm - steady,
        "captured_energy": float(energy["kernel"]),
    }


def _compiled(
    tx: optax.GradientTransformation, gradients: Any, refresh: bool
) -> Callable[[Any, Any], Any]:
    def update(gradients: Any, state: Any) -> Any:
        return tx.update(gradients, state, refresh=refresh)

    state = jax.eval_shape(tx.init, gradients)
    return jax.jit(update).lower(gradients, state).compile()


def _timed(step: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    updates, state = jax.block_until_ready(step())
    del updates
    return time.perf_counter() - start, state


def _median(step: Callable[[], Any]) -> tuple[float, Any]:
    """Median seconds, and the state after the last."""
    runs = [_timed(step)]
    while sum(seconds for seconds, _ in runs) < SECONDS and len(runs) < MOST:
        runs[-1] = (runs[-1][0], None)
        runs.append(_timed(step))
    return statistics.median(seconds for seconds, _ in runs), runs[-1][1]


Size = tuple[int, int]


def total(seconds: dict[Size, float], counts: dict[Size, int]) -> float:
    """Over all matrices of a model, of the seconds of one of each shape."""
    return sum(counts[shape] * each for shape, each in seconds.items())


def in_words(seconds: dict[Size, float], counts: dict[Size, int]) -> str:
    return " + ".join(
        f"{counts[m, n]} x {each:.4g} s ({m} x {n})" for (m, n), each in seconds.items()
    )


def whole_model(
    name: str, shapes: Shapes, rank: int, get: Callable[[Problem], dict[str, Any]]
) -> dict[str, Any]:
    """Totals of every method, and their ratios to exact SVD."""
    counts, found = shapes.matrices(), {}
    for method in METHODS:
        rows = {shape: get(Problem(method, shape, rank)) for shape in counts}
        times = {shape: row["refresh_seconds"] for shape, row in rows.items()}
        first = {shape: row["first_refresh_seconds"] for shape, row in rows.items()}
        found[method] = {
            "refresh_seconds": total(times, counts),
            "sum": in_words(times, counts),
            "first_refresh_seconds": total(first, counts),
            "by_shape": {f"{m} x {n}": row for (m, n), row in rows.items()},
        }
    for row in found.values():
        row["times_faster_than_svd"] = (
            found[EXACT]["refresh_seconds"] / row["refresh_seconds"]
        )
        row["share_of_exact_energy"] = {
            shape: each["captured_energy"]
            / found[EXACT]["by_shape"][shape]["captured_energy"]
            for shape, each in row["by_shape"].items()
        }
    return {"model": name, "rank": rank, "methods": found}


def show(result: dict[str, Any]) -> None:
    print(f"\nLLaMA-{result['model']}, rank {result['rank']}: all its projectors, once")
    for method, row in result["methods"].items():
        shares = ", ".join(f"{x:.4f}" for x in row["share_of_exact_energy"].values())
        print(
            f"{method:22}{row['refresh_seconds']:12.2f} s"
            f"{row['times_faster_than_svd']:9.1f}x  of the exact energy {shares}"
        )
        print(f"{'':22}= {row['sum']}")


def main() -> None:
    parser = recording.parser(__doc__)
    parser.add_argument("--model", default="7b")
    parser.add_argument("--divisor", type=int, default=4, help="width over rank")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    model = "60m" if arguments.quick else arguments.model
    shapes = Shapes.load(model)
    runs = common.Runs("speed/refresh_7b")

    def get(problem: Problem) -> dict[str, Any]:
        if arguments.quick:
            return measure(problem)
        row = runs.get(problem.key, lambda: measure(problem))
        print(f"{problem.key}: {row['refresh_seconds']:.3f} s", flush=True)
        return row

    result = whole_model(model, shapes, shapes.width // arguments.divisor, get)
    show(result)
    platform = "" if jax.default_backend() == "cpu" else f"_{jax.default_backend()}"
    name = f"speed/refresh_{model}{platform}"
    if arguments.divisor != 4:
        name += f"_d{arguments.divisor}"
    recording.write(arguments.quick, name, result, [])


if __name__ == "__main__":
    main()
