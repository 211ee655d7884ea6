# SPDX-License-Identifier: Apache-2.0
"""What a step of each method of the family costs beside AdamW's and GaLore's.

LLaMA-130M shapes, f32, one leaf a matrix, rank a quarter of the width, the rank of
APOLLO-Mini 1. Steady steps, but for LDAdam, which renews its bases in each. All take
turns within one process; a ratio is the median of those within a turn. Two more rows
are projections alone, of all gradients: by projectors that are stored, as GaLore's,
and by those that are drawn beside each product, as APOLLO's.

    python -m benchmarks.speed.family_step [--quick]
"""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

import galore_optax
from benchmarks.lib import records
from benchmarks.lib.shapes import QUICK, Shapes, gradients, weights
from benchmarks.lib.subjects import ADAMW, GALORE, NEVER, RATE, Subject, timed
from benchmarks.speed import tables

ROUNDS = 7
STORED, DRAWN = "projection alone, stored", "projection alone, drawn"
MINI = "apollo_mini_adamw"
Make = Callable[[], optax.GradientTransformation]


def transformations(rank: int) -> dict[str, Make]:
    low = {"rank": rank, "update_proj_gap": NEVER}
    return {
        ADAMW: lambda: optax.adamw(RATE),
        GALORE: lambda: galore_optax.galore_adamw(RATE, **low),
        "fira_adamw": lambda: galore_optax.fira_adamw(RATE, **low),
        "apollo_adamw": lambda: galore_optax.apollo_adamw(RATE, **low),
        MINI: lambda: galore_optax.apollo_mini_adamw(RATE, update_proj_gap=NEVER),
        "galore_muon": lambda: galore_optax.galore_muon(RATE, **low),
        "ldadam(error_feedback=False)": lambda: galore_optax.ldadam(
            RATE, rank=rank, error_feedback=False
        ),
    }


class Projection(Subject):
    """Coordinates of all gradients, and nothing made of them."""

    def lower(self, tx: optax.GradientTransformation, params: Any, state: Any) -> Any:
        def project(gradients: Any, state: Any, params: Any) -> Any:
            low, state = galore_optax.project_gradients(
                tx, gradients, state, params, refresh=False
            )
            return state, low

        return jax.jit(project, donate_argnums=1).lower(params, state, params)


def subjects(params: Any, rank: int) -> dict[str, Subject]:
    found = {
        name: Subject(make(), params) for name, make in transformations(rank).items()
    }
    drawn = galore_optax.subspace.gaussian()
    for name, method in ((STORED, None), (DRAWN, drawn)):
        tx = galore_optax.galore(optax.sgd(RATE), rank=rank, subspace=method)
        found[name] = Projection(tx, params)
    return found


def measure(shapes: Shapes, rank: int, rounds: int = ROUNDS) -> dict[str, Any]:
    tree = shapes.tree()
    params, old = weights(tree), gradients(tree)
    Subject(optax.sgd(RATE), params)  # start XLA before anyone is timed
    found = subjects(params, rank)
    for turn in range(1 + rounds):
        for subject in found.values():
            seconds, _ = timed(subject.step, old)
            if turn:  # the first refreshes
                subject.steady.append(seconds)
    return {"rank": rank, "rows": {name: row(found, name) for name in found}}


def row(found: Mapping[str, Subject], name: str) -> dict[str, Any]:
    return {
        "compile_seconds": found[name].compile_seconds,
        "steady_seconds": statistics.median(found[name].steady),
        "state_bytes": found[name].state_bytes,
        "over": {base: over(found, name, base) for base in (ADAMW, GALORE)},
    }


def over(found: Mapping[str, Subject], name: str, base: str) -> float:
    pairs = zip(found[name].steady, found[base].steady, strict=True)
    return statistics.median(x / y for x, y in pairs)


def main() -> None:
    quick = records.parser(__doc__, quick=True).parse_args().quick
    shapes = QUICK if quick else Shapes.load("130m")
    found = measure(shapes, shapes.width // 4, 2 if quick else ROUNDS)
    print(tables.family_step(found))
    records.write("speed/family_step", found, quick=quick)


if __name__ == "__main__":
    main()
