# SPDX-License-Identifier: Apache-2.0
"""torch's optimizers on the same card, in f32: AdamW, fused and not, galore-torch."""

import dataclasses
import statistics
import time
from typing import Any

from benchmarks.lib.subjects import Shapes
from benchmarks.speed import rivals

GAP = 10


@dataclasses.dataclass(frozen=True)
class TorchStep:
    """One of `rivals.TORCH` for one model, one parameter a matrix."""

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

        rank = self.shapes.width // 4
        leaves = rivals.leaves(self.shapes.tree())
        params = {path: made(shape) for path, shape in leaves}
        optimizer = rivals.torch_optimizer(self.optimizer, params, rank, GAP)
        times = [self._seconds(optimizer.step) for _ in range(GAP + 1)]
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

    def _seconds(self, step: Any) -> float:
        self._wait()
        start = time.perf_counter()
        step()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()
