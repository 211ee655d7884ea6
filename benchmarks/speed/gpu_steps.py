# SPDX-License-Identifier: Apache-2.0
"""Steps on one device: of an optimizer, weights in place, and of whole training.

Comparisons are at equal precision: at 16-bit weights `optax.adamw` keeps its moments in
the dtype of the weights, ours in f32, so that it stands there twice, with its own and
with f32 moments.
"""

import dataclasses
import statistics
from typing import Any

import jax
import numpy as np

from benchmarks.lib.shapes import Shapes, large_gradients, named, weights
from benchmarks.lib.subjects import InPlace, optimizer, timed
from benchmarks.speed import rivals

import attention
from model import Config, Numerics
from peaks import peak_flops
from steps import LayerProgram, Program

GAP = 12
TRAINING_GAP = 50
BATCHES = 8


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer for one model."""

    model: str
    shapes: Shapes
    dtype: str
    stacked: bool
    optimizer: str

    def __str__(self) -> str:
        layout = "stacked" if self.stacked else "one leaf a matrix"
        return f"{self.model} {self.dtype}, {layout}: {self.optimizer}"

    def measure(self) -> dict[str, Any]:
        """Medians of steps; a refresh is what its step takes longer."""
        rank = self.shapes.width // 4
        tree = self.shapes.stacked() if self.stacked else self.shapes.tree()
        gradients = large_gradients(tree, self.dtype)
        tx = optimizer(self.optimizer, rank, GAP)
        subject = InPlace(tx, weights(tree, self.dtype))
        times = [subject.seconds(gradients) for _ in range(2 * GAP + 1)]
        steady = statistics.median(t for i, t in enumerate(times) if i % GAP)
        return {
            **{k: v for k, v in vars(self).items() if k != "shapes"},
            "rank": rank,
            "compile_seconds": subject.compile_seconds,
            "steady_seconds": steady,
            "first_refresh_seconds": times[0] - steady,
            "refresh_seconds": min(times[GAP], times[2 * GAP]) - steady,
            "state_bytes": subject.state_bytes,
        }


@dataclasses.dataclass(frozen=True)
class TorchStep:
    """One of `rivals.TORCH` in f32 on the same card, one parameter a matrix."""

    model: str
    shapes: Shapes
    optimizer: str
    device: str = "cuda"

    def __str__(self) -> str:
        return f"{self.model} float32, torch: {self.optimizer}"

    def measure(self) -> dict[str, Any]:
        import torch

        def made(shape: tuple[int, ...]) -> Any:
            turned = torch.randn(shape[::-1], device=self.device)
            parameter = torch.nn.Parameter(0.02 * turned)
            parameter.grad = 1e-3 * torch.randn_like(parameter)
            return parameter

        def waited() -> None:
            found.step()
            if self.device == "cuda":
                torch.cuda.synchronize()

        rank = self.shapes.width // 4
        shapes = named(self.shapes.tree())
        params = {path: made(shape) for path, shape in shapes.items()}
        found = rivals.torch_optimizer(self.optimizer, params, rank, GAP)
        if self.device == "cuda":
            torch.cuda.synchronize()
        times = [timed(waited)[0] for _ in range(GAP + 1)]
        steady = statistics.median(times[1:GAP])
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "rank": rank,
            "torch": torch.__version__,
            "steady_seconds": steady,
            "first_refresh_seconds": times[0] - steady,
            "refresh_seconds": times[GAP] - steady,
        }


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
        tx = optimizer(self.method, config.width // 4, TRAINING_GAP)
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
