# SPDX-License-Identifier: Apache-2.0
"""Seconds to trace and to lower an update, and of un-jitted updates, in many leaves.

An unstacked LLaMA of 41 layers has 287 kernels, an embedding, a norm and a head: 290
leaves, small ones, since shapes hardly matter. All take turns within one process. Each
trace begins without what JAX remembers, with a transformation made anew, as in a new
process; so does the first of the un-jitted updates, of which later ones follow. Those
of `optax.contrib.galore` are left out: it compiles its refreshes anew at every call.

    python -m benchmarks.speed.trace_time [--rounds 3] [--calls 5] [--quick]
"""

import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from benchmarks.lib import recording
from benchmarks.lib.subjects import random_tree

LAYERS = 41
RANK = 32  # of 128, at which moments are worth storing in eight bits
SIZES = {"width": 128, "hidden": 344, "vocab": 512}
BASES = ("optax.adamw", "optax.contrib.galore")
NOT_EAGER = "optax.contrib.galore"
_RATE = 1e-3

Seconds = dict[str, list[float]]


def transformations() -> dict[str, Callable[[], optax.GradientTransformation]]:
    ours = {"rank": RANK}
    return {
        "optax.adamw": lambda: optax.adamw(_RATE),
        "optax.contrib.galore": lambda: optax.contrib.galore(_RATE, **ours),
        "galore_adamw": lambda: galore_optax.galore_adamw(_RATE, **ours),
        "galore_adamw8bit": lambda: galore_optax.galore_adamw8bit(_RATE, **ours),
    }


def shapes(layers: int, width: int, hidden: int, vocab: int) -> Any:
    """Of seven kernels a layer, an embedding, a norm and a head."""
    square, up, down = (width, width), (width, hidden), (hidden, width)
    layer = {name: square for name in "qkvo"} | {"gate": up, "up": up, "down": down}
    kernels = {name: {"kernel": shape} for name, shape in layer.items()}
    return {
        "embed": {"embedding": (vocab, width)},
        "layers": [kernels for _ in range(layers)],
        "norm": {"scale": (width,)},
        "lm_head": {"kernel": (width, vocab)},
    }


def make_params(layers: int, sizes: Mapping[str, int]) -> Any:
    tree = shapes(layers, **sizes)
    return random_tree(tree, 0, lambda k, s: 0.02 * jax.random.normal(k, s))


def traced(
    make: Callable[[], optax.GradientTransformation], params: Any
) -> dict[str, float]:
    """Seconds to trace an update, and then to lower it, from nothing."""
    tx = make()
    state = jax.eval_shape(tx.init, params)
    jax.clear_caches()
    start = time.perf_counter()
    found = jax.jit(lambda *given: tx.update(*given)).trace(params, state, params)
    middle = time.perf_counter()
    found.lower()
    return {"trace": middle - start, "lower": time.perf_counter() - middle}


def eager(
    make: Callable[[], optax.GradientTransformation], params: Any, calls: int
) -> dict[str, float]:
    """Seconds of an un-jitted update: the first, and the median of later ones."""
    tx = make()
    state = tx.init(params)
    jax.clear_caches()
    seconds = []
    for _ in range(1 + calls):
        jax.block_until_ready(state)
        start = time.perf_counter()
        _, state = jax.block_until_ready(tx.update(params, state, params))
        seconds.append(time.perf_counter() - start)
    later = statistics.median(seconds[1:])
    return {"first un-jitted update": seconds[0], "later un-jitted updates": later}


def measure(params: Any, rounds: int, calls: int) -> dict[str, Seconds]:
    """Seconds by transformation and by what is timed, a number a round."""
    subjects = transformations()
    found: dict[str, Seconds] = {name: {} for name in subjects}
    jax.block_until_ready(jax.jit(jnp.square)(1.0))  # start XLA before anyone is timed
    for _ in range(rounds):
        for name, make in subjects.items():
            row = traced(make, params)
            row |= eager(make, params, calls) if name != NOT_EAGER else {}
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


def show(found: Mapping[str, Any]) -> None:
    """Seconds, and how many times those of each base."""
    for name, row in found.items():
        print(name)
        for what, cell in row.items():
            ratios = "".join(f", {x:.2f} x {base}" for base, x in cell["over"].items())
            print(f"  {what:26}{cell['seconds']:8.3f} s{ratios}")


def main() -> None:
    parser = recording.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=5, help="un-jitted, after one")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    layers = 1 if arguments.quick else LAYERS
    params = make_params(layers, SIZES)
    found = summary(measure(params, arguments.rounds, arguments.calls))
    show(found)
    number = len(jax.tree.leaves(params))
    result = {"leaves": number, "rank": RANK, "sizes": SIZES, "optimizers": found}
    recording.write(arguments.quick, "speed/trace_time", result)


if __name__ == "__main__":
    main()
