# SPDX-License-Identifier: Apache-2.0
"""Seconds of an optimizer step and of a refresh on one device, weights in place.

Comparisons are at equal precision: at 16-bit weights `optax.adamw` keeps its moments in
the dtype of the weights, ours in f32, so that it stands there twice, with its own and
with f32 moments.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from benchmarks.lib import gpu_shapes
from benchmarks.lib.subjects import InPlace, Shapes

GAP = 12


def with_f32_moments(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """`tx` on parameters and gradients in f32; its updates in their dtypes again."""

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        wide = None if params is None else cast(params)
        found, state = tx.update(cast(updates), state, wide)
        return jax.tree.map(lambda x, y: x.astype(y.dtype), found, updates), state

    return optax.GradientTransformation(lambda params: tx.init(cast(params)), update)


Make = Callable[[int, int], optax.GradientTransformation]
OPTIMIZERS: dict[str, Make] = {
    "optax.adamw": lambda rank, gap: optax.adamw(1e-3),
    "optax.adamw, f32 moments": lambda rank, gap: with_f32_moments(optax.adamw(1e-3)),
    "galore_adamw": lambda rank, gap: galore_optax.galore_adamw(
        1e-3, rank=rank, update_proj_gap=gap
    ),
    "galore_adamw8bit": lambda rank, gap: galore_optax.galore_adamw8bit(
        1e-3, rank=rank, update_proj_gap=gap
    ),
    "optax.contrib.galore": lambda rank, gap: optax.contrib.galore(
        1e-3, rank=rank, update_proj_gap=gap
    ),
}


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
        tree = gpu_shapes.stacked(self.shapes) if self.stacked else self.shapes.tree()
        gradients = gpu_shapes.gradients(tree, self.dtype)
        tx = OPTIMIZERS[self.optimizer](rank, GAP)
        subject = InPlace(tx, gpu_shapes.weights(tree, self.dtype))
        times = [subject.seconds(gradients) for _ in range(2 * GAP + 1)]
        steady = statistics.median(t for i, t in enumerate(times) if i % GAP)
        return {
            "model": self.model,
            "dtype": self.dtype,
            "stacked": self.stacked,
            "optimizer": self.optimizer,
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
    jax.block_until_ready(subject.params)
    start = time.perf_counter()
    for _ in range(GAP - 2):
        subject.step(gradients)
    jax.block_until_ready(subject.params)
    return (time.perf_counter() - start) / (GAP - 2)
