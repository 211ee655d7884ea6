# SPDX-License-Identifier: Apache-2.0
"""Bytes that devices which share a batch all-reduce in a training step."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import galore_optax
from benchmarks.lib.training_steps import NEVER, abstract, loss_of, training_step
from benchmarks.memory import hlo
from galore_optax import memory

DEVICES = 8
_OPCODES = "all-reduce", "all-reduce-start"
_BITS = re.compile(r"\d+")


def in_program(
    sizes: memory.Sizes, tx: Any, setting: memory.Setting, gradients: str
) -> int:
    """Of a steady step, as compiled for CPU devices; nothing is allocated."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    params, state, parts = abstract(sizes, tx, setting)
    everywhere = NamedSharding(mesh, PartitionSpec())
    params, state = jax.tree.map(
        lambda x: x.update(sharding=everywhere), (params, state)
    )
    parts = parts.update(sharding=NamedSharding(mesh, PartitionSpec(None, "data")))
    step = training_step(loss_of(sizes, setting.remat), tx, gradients, False)
    kept = jax.tree.map(lambda x: x.sharding, (params, state))
    jitted = jax.jit(step, out_shardings=(*kept, None))
    text = jitted.lower(params, state, parts).compile().as_text()
    program = hlo.Program.parse(text)
    return reduced(program, program.entry)


def reduced(program: hlo.Program, name: str) -> int:
    """Bytes of a computation, each turn of its loops counted."""
    total = 0
    for line in program.computations[name]:
        if line.opcode in _OPCODES:
            total += sum(map(_bytes, line.arrays))
        inside = sum(reduced(program, called) for called in line.called())
        if inside and line.opcode == "while" and line.trips is None:
            raise ValueError(f"{line.name}: how often it reduces is not known.")
        total += inside * (line.trips or 1)
    return total


def _bytes(array: hlo.Array) -> int:
    bits = _BITS.search(array.dtype)
    return math.prod(array.shape) * (int(bits[0]) if bits else 8) // 8


def from_shapes(
    sizes: memory.Sizes, tx: Any, setting: memory.Setting, gradients: str
) -> int:
    """The same from shapes: the loss, and each gradient or its coordinates."""
    loss = loss_of(sizes, setting.remat)
    params, state, parts = abstract(sizes, tx, setting)
    low: Any = params
    if gradients == NEVER:
        make = galore_optax.value_and_projected_grad(loss, tx, refresh=False)
        part = jax.eval_shape(lambda x: x[0], parts)
        low = jax.eval_shape(make, params, state, part)[1]
    return memory.tree_bytes(low) + jnp.dtype(jnp.float32).itemsize
