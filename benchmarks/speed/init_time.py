# SPDX-License-Identifier: Apache-2.0
"""What `init` of eight-bit state takes: compiled, in seconds; eager, in memory.

    python -m benchmarks.speed.init_time [--quick]

LLaMA shapes with one leaf for all layers, weights in bf16. Compiled means
`jax.jit(tx.init)`: traced, compiled and run. Of the eager run, the peak of resident
memory above what the process held before is set beside the bytes of the state.
"""

import multiprocessing
import resource
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from benchmarks.lib import records
from benchmarks.lib.shapes import Shapes, abstract
from benchmarks.lib.subjects import EIGHT_BIT, optimizer, timed
from benchmarks.speed import tables

QUANTIZED = "quantized(adamw)"
QUICK = Shapes(64, 172, 2, vocab=1000)


def transformation(name: str, shapes: Shapes) -> optax.GradientTransformation:
    if name == QUANTIZED:
        return galore_optax.quantized(optax.adamw(1e-3))
    return optimizer(name, shapes.width // 4, 200)


def zeros(shapes: Shapes) -> Any:
    params = abstract(shapes.stacked())
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)


def compiled(name: str, shapes: Shapes, run: bool) -> dict[str, float]:
    """Seconds of each stage; not run where the state would not fit in memory."""
    tx, params = transformation(name, shapes), abstract(shapes.stacked())
    trace, lowered = timed(lambda: jax.jit(tx.init).lower(params))
    compile_seconds, program = timed(lowered.compile)
    found = {"trace_seconds": trace, "compile_seconds": compile_seconds}
    return found | ({"run_seconds": timed(program, zeros(shapes))[0]} if run else {})


def eager(name: str, shapes: Shapes) -> dict[str, float]:
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


def main() -> None:
    quick = records.parser(__doc__, quick=True).parse_args().quick
    large, small = (QUICK, QUICK) if quick else map(Shapes.load, ("7b", "60m"))
    found = {
        name: {
            "jit(init), 7B": apart(compiled, name, large, False),
            "jit(init), 60M": apart(compiled, name, small, True),
            "eager init, 60M": apart(eager, name, small),
        }
        for name in (QUANTIZED, EIGHT_BIT)
    }
    print(tables.init_time(found))
    records.write("speed/init_time", found, quick=quick)


if __name__ == "__main__":
    main()
