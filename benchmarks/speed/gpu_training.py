# SPDX-License-Identifier: Apache-2.0
"""Tokens a second and peak bytes of whole training steps on one device.

The example's program (examples/llama) on random tokens, which need no network; the loss
means nothing here.
"""

import dataclasses
from typing import Any

import jax
import numpy as np

from benchmarks.lib.subjects import optimizer, timed

import attention
from model import Config, Numerics
from peaks import peak_flops
from steps import LayerProgram, Program

GAP = 50
BATCHES = 8


@dataclasses.dataclass(frozen=True)
class Training:
    """One model trained by one method."""

    model: str
    method: str
    batch: int
    tokens: int  # a sequence
    steps: int = 50  # timed
    compute: str = "bfloat16"  # and the weights
    remat: bool = False
    layerwise: bool = False

    def __str__(self) -> str:
        how = ", layerwise" if self.layerwise else ""
        count = self.batch * self.tokens
        return f"{self.model} {self.compute}, {count} tokens{how}: {self.method}"

    def measure(self) -> dict[str, Any]:
        config, program = Config.load(self.model), self._program()
        state = program.init(program.init_params(0))
        update, _ = program.compiled(state)
        batches = [program.put(self._batch(config, i)) for i in range(BATCHES)]
        first, (state, _) = timed(update, state, batches[0])

        def run(state: Any) -> Any:
            for number in range(self.steps):
                state, _ = update(state, batches[number % BATCHES])
            return state

        return self._row(config, program, timed(run, state)[0] / self.steps, first)

    def _program(self) -> Program:
        config = Config.load(self.model)
        head = config.width // config.heads
        kernel = attention.implementation("auto", self.compute, head)
        numerics = Numerics(self.compute, self.compute, self.remat, kernel)
        tx = optimizer(self.method, config.width // 4, GAP)
        kind = LayerProgram if self.layerwise else Program
        return kind(config, numerics, tx, accumulation=1, mesh=None)

    def _batch(self, config: Config, seed: int) -> np.ndarray:
        shape = self.batch, self.tokens + 1
        made = np.random.default_rng(seed).integers(0, config.vocab, shape)
        return made.astype(np.int32)

    def _row(
        self, config: Config, program: Program, seconds: float, first: float
    ) -> dict[str, Any]:
        count = self.batch * self.tokens
        device = jax.local_devices()[0]
        flops = count / seconds * flops_per_token(config, self.tokens)
        peak = peak_flops(device.device_kind, self.compute)
        return {
            "model": self.model,
            "method": self.method,
            "tokens": count,
            "layerwise": self.layerwise,
            "attention": program.numerics.attention,
            "first_step_seconds": first,  # compiled and run
            "step_seconds": seconds,
            "tokens_per_second": count / seconds,
            "flops_per_second": flops,
            "flop_utilisation": peak and flops / peak,
            "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        }


def flops_per_token(config: Config, tokens: int) -> float:
    """6 a matrix parameter, and attention's 12 T D a layer; nothing computed anew."""
    width, layers = config.width, config.layers
    matrices = layers * (4 * width**2 + 3 * width * config.hidden)
    return 6.0 * (matrices + width * config.vocab) + 12 * layers * width * tokens
