# SPDX-License-Identifier: Apache-2.0
"""An optimizer step, compiled for a card that need not be there.

    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)

as one program, bf16 weights and gradients, weights and state donated.
"""

import dataclasses
import sys
from typing import Any

import jax
import optax

from benchmarks.lib.shapes import abstract
from benchmarks.lib.subjects import applied, timed
from galore_optax import memory

OPTIONS = {"xla_gpu_autotune_level": 0}  # nothing can be timed without the device


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The program, what it was given, and the seconds of making it."""

    program: Any
    params: Any
    state: Any
    trace_seconds: float
    compile_seconds: float


def compile_step(
    tx: optax.GradientTransformation, tree: Any, target: memory.Target, **extra: Any
) -> Compiled:
    """The step of `tx` for shapes `tree`; `extra` are arguments of the update."""
    sharding = jax.sharding.SingleDeviceSharding(target.device())
    params = abstract(tree)
    state = jax.eval_shape(tx.init, params)
    placed = jax.tree.map(
        lambda x: x.update(sharding=sharding), (params, state, params)
    )
    step = jax.jit(applied(tx, **extra), donate_argnums=(0, 1))
    trace_seconds, lowered = timed(
        lambda: step.trace(*placed).lower(lowering_platforms=(target.platform,))
    )
    seconds, program = timed(lambda: lowered.compile(compiler_options=OPTIONS))
    return Compiled(program, params, state, trace_seconds, seconds)


def prepared(name: str) -> memory.Target:
    """The target called `name`; ends the process where its compiler is not there."""
    target = memory.target(name)
    target.prepare()
    try:
        target.device()
    except RuntimeError as error:
        print(f"skipped, nothing is recorded: {error}")
        sys.exit()
    return target
