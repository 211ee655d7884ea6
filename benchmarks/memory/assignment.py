# SPDX-License-Identifier: Apache-2.0
"""Compiles a training step for a device that is not there, and reads what it holds."""

import dataclasses
import re
from typing import Any

import jax
import optax

from benchmarks.lib.training_steps import abstract, step_of
from benchmarks.memory.targets import Target
from galore_optax import memory
from galore_optax.memory import Setting, Sizes

# As in "Used 25.47G of 15.75G hbm" and "required for HLO temporaries (52.91G) exceeds
# available HBM (15.75G)".
_SIZE = r"(\d+(?:\.\d+)?[KMGT]?)"
_EXCEEDED = (
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
    re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
)
# Nothing can be timed without the device.
OPTIONS = {"cuda": {"xla_gpu_autotune_level": 0}, "tpu": {}}


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The compiler's buffer assignment of one step, in bytes."""

    target: str
    capacity: int  # of the device
    arguments: int = 0  # weights, state and tokens
    temporaries: int = 0
    outputs: int = 0
    aliased: int = 0  # outputs that take the place of donated arguments
    tokens: int = 0  # of the batch, among the arguments
    refused: int | None = None  # bytes, where the compiler refused the program

    @property
    def total(self) -> int:
        """arguments + temporaries + outputs - aliased, or what the refusal names."""
        if self.refused is not None:
            return self.refused
        return self.arguments + self.temporaries + self.outputs - self.aliased

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity


def compile_step(
    sizes: Sizes,
    tx: optax.GradientTransformation,
    setting: Setting,
    target: Target,
    refresh: bool | None = None,
) -> Assignment:
    """The buffer assignment of one full training step of a LLaMA on `target`.

    Loss, gradients and update are one program, parameters and state donated. What XLA
    assigns here is what it allocates on the device.

    Args:
      sizes: of the model.
      tx: the optimizer.
      setting: tokens, dtype, remat and so on.
      target: from `target(name)`; call its `prepare()` before anything else.
      refresh: as for `galore`; `False` leaves it out of the program.

    Returns:
      an `Assignment`, also of a program that does not fit.

    Raises:
      RuntimeError: the compiler of the target is not installed.

    Source: `jax.experimental.topologies`, XLA's ahead-of-time compilation.
    """
    tokens = memory.tree_bytes(abstract(sizes, tx, setting)[2])
    return _assign(lower_step(sizes, tx, setting, target, refresh), target, tokens)


def lower_step(
    sizes: Sizes,
    tx: optax.GradientTransformation,
    setting: Setting,
    target: Target,
    refresh: bool | None = None,
    shares: int = 1,
) -> jax.stages.Lowered:
    """The program that `compile_step` compiles."""
    sharding = jax.sharding.SingleDeviceSharding(target.device())
    given = abstract(sizes, tx, setting)
    placed = jax.tree.map(lambda x: x.update(sharding=sharding), given)
    made = step_of(sizes, tx, setting, refresh, shares)
    step = jax.jit(made, donate_argnums=(0, 1))
    return step.trace(*placed).lower(lowering_platforms=(target.platform,))


def _assign(lowered: Any, target: Target, tokens: int) -> Assignment:
    try:
        compiled = lowered.compile(compiler_options=OPTIONS[target.platform])
    except jax.errors.JaxRuntimeError as error:
        return _refusal(error, target, tokens)
    found = compiled.memory_analysis()
    return Assignment(
        target.name,
        target.memory,
        arguments=found.argument_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        outputs=found.output_size_in_bytes,
        aliased=found.alias_size_in_bytes,
        tokens=tokens,
    )


def _refusal(error: Exception, target: Target, tokens: int) -> Assignment:
    matches = [pattern.search(str(error)) for pattern in _EXCEEDED]
    found = next((match for match in matches if match), None)
    if found is None:
        raise error
    used, have = (memory.parse_size(_binary(size)) for size in found.groups())
    return Assignment(target.name, have, tokens=tokens, refused=used)


def _binary(size: str) -> str:
    return f"{size}iB" if size[-1].isalpha() else size
