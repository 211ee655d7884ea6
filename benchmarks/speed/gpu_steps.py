# SPDX-License-Identifier: Apache-2.0
"""Seconds of an optimizer step and of a refresh on one device, weights in place.

Comparisons are at equal precision: at 16-bit weights `optax.adamw` keeps its moments in
the dtype of the weights, ours in f32, so that it stands there twice, with its own and
with f32 moments.
"""

import dataclasses
import statistics
from typing import Any

import jax

from benchmarks.lib.shapes import Shapes, large_gradients, named, weights
from benchmarks.lib.subjects import InPlace, optimizer, timed
from benchmarks.speed import rivals

GAP = 12


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
            "pipelined_seconds": _pipelined(subject, gradients),
            "first_refresh_seconds": times[0] - steady,
            "refresh_seconds": min(times[GAP], times[2 * GAP]) - steady,
            "state_bytes": subject.state_bytes,
        }


def _pipelined(subject: InPlace, gradients: Any) -> float:
    """Seconds a step where the host does not wait for each, no refresh among them."""

    def run() -> Any:
        for _ in range(GAP - 2):
            subject.step(gradients)
        return subject.params

    jax.block_until_ready(subject.params)
    return timed(run)[0] / (GAP - 2)


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
