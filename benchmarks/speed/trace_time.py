# SPDX-License-Identifier: Apache-2.0
"""Seconds to trace `init`, to trace and to lower an update, and of un-jitted updates.

A LLaMA of 41 layers, one leaf a matrix and one norm for all, has 290 leaves, small
ones, since shapes hardly matter. All take turns within one process. Each trace begins
without what JAX remembers, with a transformation made anew, as in a new process; so
does the first of the un-jitted updates, of which later ones follow. Those of
`optax.contrib.galore` are left out: it compiles its refreshes anew at every call. What
an inner does with params is read when `init` is traced, and not again by updates.
Beside that, `jit(init)` at 7B, a leaf for all layers: traced, lowered and compiled.

    python -m benchmarks.speed.trace_time [--quick]
"""

import statistics
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.lib import records
from benchmarks.lib.shapes import Shapes, abstract, weights
from benchmarks.lib.subjects import ADAMW, EIGHT_BIT, GALORE, THEIRS, optimizer, timed
from benchmarks.speed import tables

SHAPES = Shapes(128, 344, 41, vocab=512)
ROUNDS, CALLS = 3, 5  # of un-jitted updates, after one
RANK = 32  # of 128, at which moments are worth storing in eight bits
BASES = (ADAMW, THEIRS)
NAMES = (*BASES, GALORE, EIGHT_BIT)

Seconds = dict[str, list[float]]
Make = Callable[[], optax.GradientTransformation]


def tree(shapes: Shapes) -> Any:
    """Without the norms of the layers."""
    return {
        name: {k: v for k, v in node.items() if not k.endswith("_norm")}
        for name, node in shapes.tree().items()
    }


def traced(make: Make, params: Any) -> dict[str, float]:
    """Seconds to trace `init`, an update, and to lower that, each from nothing."""
    tx = make()
    jax.clear_caches()
    init, state = timed(lambda: jax.eval_shape(tx.init, params))
    jax.clear_caches()
    update = jax.jit(lambda *given: tx.update(*given))
    trace, found = timed(lambda: update.trace(params, state, params))
    return {"init": init, "trace": trace, "lower": timed(found.lower)[0]}


def compiled_init(name: str, shapes: Shapes, rank: int) -> dict[str, float]:
    """Seconds of the stages of `jit(init)`, which is not run."""
    tx, params = optimizer(name, rank, 200), abstract(shapes.stacked(), jnp.bfloat16)
    jax.clear_caches()
    trace, traced = timed(lambda: jax.jit(tx.init).trace(params))
    lower, lowered = timed(traced.lower)
    return {"trace": trace, "lower": lower, "compile": timed(lowered.compile)[0]}


def eager(make: Make, params: Any, calls: int) -> dict[str, float]:
    """Seconds of an un-jitted update: the first, and the median of later ones."""
    tx = make()
    state, seconds = tx.init(params), []
    jax.clear_caches()
    for _ in range(1 + calls):
        spent, (_, state) = timed(tx.update, params, state, params)
        seconds.append(spent)
    later = statistics.median(seconds[1:])
    return {"first un-jitted update": seconds[0], "later un-jitted updates": later}


def measure(params: Any, rounds: int, calls: int) -> dict[str, Seconds]:
    """Seconds by transformation and by what is timed, a number a round."""
    found: dict[str, Seconds] = {name: {} for name in NAMES}
    jax.block_until_ready(jax.jit(jnp.square)(1.0))  # start XLA before anyone is timed
    for _ in range(rounds):
        for name in NAMES:
            make = lambda name=name: optimizer(name, RANK, 200)  # noqa: E731
            row = traced(make, params)
            row |= eager(make, params, calls) if name != THEIRS else {}
            for what, seconds in row.items():
                found[name].setdefault(what, []).append(seconds)
    return found


def summary(found: Mapping[str, Seconds]) -> dict[str, Any]:
    """Medians, and the medians of ratios within a round."""
    return {
        name: {
            what: {
                "seconds": statistics.median(seconds),
                "over": {
                    base: ratio(seconds, found[base][what])
                    for base in BASES
                    if what in found[base]
                },
                "rounds": seconds,
            }
            for what, seconds in row.items()
        }
        for name, row in found.items()
    }


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(ours, theirs, strict=True))


def main() -> None:
    quick = records.parser(__doc__, quick=True).parse_args().quick
    warnings.simplefilter("ignore", DeprecationWarning)
    params = weights(tree(Shapes(128, 344, 1, vocab=512) if quick else SHAPES))
    found = summary(measure(params, ROUNDS, CALLS))
    large, rank = (SHAPES, RANK) if quick else (Shapes.load("7b"), 1024)
    result = {
        "leaves": len(jax.tree.leaves(params)),
        "rank": RANK,
        "optimizers": found,
        "init": {
            name: compiled_init(name, large, rank) for name in (GALORE, EIGHT_BIT)
        },
    }
    print(tables.trace_time(result), tables.init_time(result), sep="\n\n")
    records.write("speed/trace_time", result, quick=quick)


if __name__ == "__main__":
    main()
