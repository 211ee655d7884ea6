# SPDX-License-Identifier: Apache-2.0
"""What `init` of eight-bit state takes: compiled, in seconds; eager, in memory.

python -m benchmarks.speed.init_time

The shapes are those of a LLaMA with stacked layers, its weights in bf16. Compiled means
`jax.jit(tx.init)`: traced, compiled and run. Of the eager run, the peak of resident
memory above what the process held before is set beside the bytes of the state.
"""

import multiprocessing
import resource
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from benchmarks.lib import recording

SIZES = {  # layers, width, hidden, vocabulary, rank
    "7B": (32, 4096, 11008, 32000, 1024),
    "60M": (8, 512, 1376, 32000, 128),
    "quick": (2, 64, 172, 1000, 16),
}
OPTIMIZERS = {
    "quantized(adamw)": lambda rank: galore_optax.quantized(optax.adamw(1e-3)),
    "galore_adamw8bit": lambda rank: galore_optax.galore_adamw8bit(1e-3, rank=rank),
}


def shapes(size: str) -> Any:
    layers, width, hidden, vocabulary, _ = SIZES[size]
    square, wide = (layers, width, width), (layers, width, hidden)
    blocks = {name: {"kernel": square} for name in ("q", "k", "v", "o")}
    blocks |= {"gate": {"kernel": wide}, "up": {"kernel": wide}}
    blocks |= {"down": {"kernel": (layers, hidden, width)}}
    blocks |= {"norm": {"scale": (layers, width)}}
    tree = {
        "embed": {"embedding": (vocabulary, width)},
        "blocks": blocks,
        "head": {"kernel": (width, vocabulary)},
    }

    def is_shape(x: Any) -> bool:
        return isinstance(x, tuple)

    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16), tree, is_leaf=is_shape
    )


def compiled(name: str, size: str) -> dict[str, float]:
    """Seconds of each stage; not run where the state would not fit in memory."""
    tx, params = OPTIMIZERS[name](SIZES[size][-1]), shapes(size)
    start = time.perf_counter()
    lowered = jax.jit(tx.init).lower(params)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    found = {"trace_seconds": traced - start, "compile_seconds": done - traced}
    if size == "7B":
        return found
    values = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
    start = time.perf_counter()
    jax.block_until_ready(program(values))
    return found | {"run_seconds": time.perf_counter() - start}


def eager(name: str, size: str) -> dict[str, float]:
    """MB of the state, of its largest leaf, and of the peak of an eager `init`."""
    tx, params = OPTIMIZERS[name](SIZES[size][-1]), shapes(size)
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
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


def _apart(function: Any, *arguments: Any) -> Any:
    """In a process of its own, whose memory has held nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    options = recording.parser(__doc__).parse_args()
    large, small = ("quick", "quick") if options.quick else ("7B", "60M")
    found = {
        name: {
            f"jit(init), {large}": _apart(compiled, name, large),
            f"jit(init), {small}": _apart(compiled, name, small),
            f"eager init, {small}": _apart(eager, name, small),
        }
        for name in OPTIMIZERS
    }
    for name, cells in found.items():
        for what, cell in cells.items():
            numbers = ", ".join(f"{key} {value:.2f}" for key, value in cell.items())
            print(f"{name:18} {what:18} {numbers}")
    recording.write(options.quick, "speed/init_time", found)


if __name__ == "__main__":
    main()
