# SPDX-License-Identifier: Apache-2.0
"""Seconds to trace and to lower an update, of un-jitted updates, and of `init`.

A LLaMA of 41 layers, one leaf a matrix and one norm for all, has 290 leaves, small
ones, since shapes hardly matter. All take turns within one process. Each trace begins
without what JAX remembers, with a transformation made anew, as in a new process; so
does the first of the un-jitted updates, of which later ones follow. Those of
`optax.contrib.galore` are left out: it compiles its refreshes anew at every call.

`init` is that of eight-bit state, of 7B and 60M with one leaf for all layers, in bf16:
compiled, in seconds; eager, the peak of resident memory above what the process held
before, beside the bytes of the state.

    python -m benchmarks.speed.trace_time [--rounds 3] [--calls 5] [--quick]
"""

import multiprocessing
import resource
import statistics
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from benchmarks.lib import records
from benchmarks.lib.shapes import Shapes, abstract, weights
from benchmarks.lib.subjects import ADAMW, EIGHT_BIT, GALORE, THEIRS, optimizer, timed
from benchmarks.speed import tables

SHAPES = Shapes(128, 344, 41, vocab=512)
RANK = 32  # of 128, at which moments are worth storing in eight bits
BASES = (ADAMW, THEIRS)
NAMES = (*BASES, GALORE, EIGHT_BIT)
QUANTIZED = "quantized(adamw)"
SMALL = Shapes(64, 172, 2, vocab=1000)

Seconds = dict[str, list[float]]
Make = Callable[[], optax.GradientTransformation]


def tree(shapes: Shapes) -> Any:
    """Without the norms of the layers."""
    return {
        name: {k: v for k, v in node.items() if not k.endswith("_norm")}
        for name, node in shapes.tree().items()
    }


def traced(make: Make, params: Any) -> dict[str, float]:
    """Seconds to trace an update, and then to lower it, from nothing."""
    tx = make()
    state = jax.eval_shape(tx.init, params)
    jax.clear_caches()
    update = jax.jit(lambda *given: tx.update(*given))
    trace, found = timed(lambda: update.trace(params, state, params))
    return {"trace": trace, "lower": timed(found.lower)[0]}


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


def transformation(name: str, shapes: Shapes) -> optax.GradientTransformation:
    if name == QUANTIZED:
        return galore_optax.quantized(optax.adamw(1e-3))
    return optimizer(name, shapes.width // 4)


def zeros(shapes: Shapes) -> Any:
    params = abstract(shapes.stacked())
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)


def compiled_init(name: str, shapes: Shapes, run: bool) -> dict[str, float]:
    """Seconds of each stage; not run where the state would not fit in memory."""
    tx, params = transformation(name, shapes), abstract(shapes.stacked())
    trace, lowered = timed(lambda: jax.jit(tx.init).lower(params))
    compile_seconds, program = timed(lowered.compile)
    found = {"trace_seconds": trace, "compile_seconds": compile_seconds}
    return found | ({"run_seconds": timed(program, zeros(shapes))[0]} if run else {})


def eager_init(name: str, shapes: Shapes) -> dict[str, float]:
    """MB of the state, of its largest leaf, and of the peak of an eager `init`."""
    tx, params = transformation(name, shapes), zeros(shapes)
    small = jax.tree.map(lambda x: x[..., :64, :64] if x.ndim > 1 else x, params)
    jax.block_until_ready((tx.init(small), params))  # what compiling takes is not ours
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state = jax.block_until_ready(tx.init(params))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bytes_of = [x.nbytes for x in jax.tree.leaves(state)]
    return {
        "state_mb": sum(bytes_of) / 1e6,
        "largest_leaf_mb": max(bytes_of) / 1e6,
        "peak_mb": (after - before) * 1024 / 1e6,
    }


def apart(function: Any, *arguments: Any) -> Any:
    """In a process of its own, whose memory has held nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def inits(quick: bool) -> dict[str, Any]:
    large, small = (SMALL, SMALL) if quick else map(Shapes.load, ("7b", "60m"))
    return {
        name: {
            "jit(init), 7B": apart(compiled_init, name, large, False),
            "jit(init), 60M": apart(compiled_init, name, small, True),
            "eager init, 60M": apart(eager_init, name, small),
        }
        for name in (QUANTIZED, EIGHT_BIT)
    }


def main() -> None:
    parser = records.parser(__doc__, quick=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=5, help="un-jitted, after one")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    shapes = Shapes(128, 344, 1, vocab=512) if arguments.quick else SHAPES
    params = weights(tree(shapes))
    found = summary(measure(params, arguments.rounds, arguments.calls))
    result = {"leaves": len(jax.tree.leaves(params)), "rank": RANK, "optimizers": found}
    print(tables.trace_time(result))
    records.write("speed/trace_time", result, quick=arguments.quick)
    found = inits(arguments.quick)
    print(tables.init_time(found))
    records.write("speed/init_time", found, quick=arguments.quick)


if __name__ == "__main__":
    main()
