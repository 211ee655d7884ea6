# SPDX-License-Identifier: Apache-2.0
"""The reference's semantics in NumPy, f64, written from its description.

Weights are (out, in) as in torch. `basis_of(matrix, rank)` returns the projector for
the rows of `matrix`; the reference takes leading singular vectors, tests may inject
another rule. The side is decided from the shape of the weight (the original decides it
again from the projected gradient, which fails for reverse_std when rank >= rows).
"""

import dataclasses
from collections.abc import Callable

import numpy as np

BasisOf = Callable[[np.ndarray, int], np.ndarray]


def svd_basis(matrix: np.ndarray, rank: int) -> np.ndarray:
    return np.linalg.svd(matrix, full_matrices=False)[0][:, :rank]


@dataclasses.dataclass
class Projector:
    """left: R = Aᵀ G; right: R = G B; full: R = Aᵀ G B."""

    rank: int
    gap: int
    scale: float
    proj_type: str
    basis_of: BasisOf
    left: np.ndarray | None = None
    right: np.ndarray | None = None

    def _sides(self, shape: tuple[int, ...]) -> tuple[bool, bool]:
        tall = shape[0] >= shape[1]
        return {
            "std": (not tall, tall),
            "reverse_std": (tall, not tall),
            "left": (True, False),
            "right": (False, True),
            "full": (True, True),
        }[self.proj_type]

    def project(self, gradient: np.ndarray, step: int) -> np.ndarray:
        use_left, use_right = self._sides(gradient.shape)
        rank = min(self.rank, *gradient.shape)
        if step % self.gap == 0:
            self.left = self.basis_of(gradient, rank) if use_left else None
            self.right = self.basis_of(gradient.T, rank) if use_right else None
        low = gradient if self.left is None else self.left.T @ gradient
        return low if self.right is None else low @ self.right

    def back(self, low: np.ndarray) -> np.ndarray:
        full = low if self.left is None else self.left @ low
        return self.scale * (full if self.right is None else full @ self.right.T)


@dataclasses.dataclass
class AdamW:
    """One parameter of GaLoreAdamW; without a projector, plain AdamW in its style."""

    projector: Projector | None
    lr: float
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-6
    step: int = 0
    m: np.ndarray | float = 0.0
    v: np.ndarray | float = 0.0

    def update(self, p: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        g = gradient
        if self.projector is not None:
            g = self.projector.project(gradient, self.step)
        self.step += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        corrections = np.sqrt(1 - self.b2**self.step) / (1 - self.b1**self.step)
        direction = self.m / (np.sqrt(self.v) + self.eps)
        if self.projector is not None:
            direction = self.projector.back(direction)
        p = p - self.lr * corrections * direction
        return p - self.lr * self.weight_decay * p


@dataclasses.dataclass
class Adafactor:
    """One parameter of GaLoreAdafactor."""

    projector: Projector | None
    lr: float | None = None
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    b1: float | None = None
    weight_decay: float = 0.0
    scale_parameter: bool = True
    step: int = 0
    row: np.ndarray | float = 0.0
    col: np.ndarray | float = 0.0
    v: np.ndarray | float = 0.0
    m: np.ndarray | float = 0.0

    def update(self, p: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        g = gradient
        if self.projector is not None:
            g = self.projector.project(gradient, self.step)
        self.step += 1
        lr = min(1e-2, 1 / np.sqrt(self.step)) if self.lr is None else self.lr
        if self.scale_parameter:
            lr = lr * max(self.eps[1], np.sqrt(np.mean(p**2)))
        update = lr * self._direction(g)
        if self.b1 is not None:
            update = self.m = self.b1 * self.m + (1 - self.b1) * update
        if self.projector is not None:
            update = self.projector.back(update)
        p = p - self.weight_decay * lr * p
        return p - update

    def _direction(self, g: np.ndarray) -> np.ndarray:
        keep = 1 - self.step**self.decay_rate
        squares = g**2 + self.eps[0]
        if g.ndim < 2:
            self.v = keep * self.v + (1 - keep) * squares
            update = g / np.sqrt(self.v)
        else:
            self.row = keep * self.row + (1 - keep) * squares.mean(-1)
            self.col = keep * self.col + (1 - keep) * squares.mean(-2)
            row = self.row / self.row.mean(-1, keepdims=True)
            update = g / np.sqrt(row)[..., None] / np.sqrt(self.col)[..., None, :]
        rms = np.sqrt(np.mean(update**2))
        return update / max(1.0, rms / self.clip_threshold)
