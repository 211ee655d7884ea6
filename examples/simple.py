# SPDX-License-Identifier: Apache-2.0
"""GaLore with AdamW for one matrix, in NumPy, an equation a line.

All that the library does beside is to do this for trees, batches and meshes, with any
optimizer of Optax in place of Adam, with cheaper bases than the SVD's, and in few bits.

    python examples/simple.py

Source: Zhao et al., arXiv 2403.03507, Algorithm 2.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


def leading_directions(gradient: np.ndarray, rank: int) -> np.ndarray:
    """(m, n) -> (m, rank): the left singular vectors of the largest singular values."""
    u, _, _ = np.linalg.svd(gradient, full_matrices=False)
    return u[:, :rank]


@dataclasses.dataclass
class Galore:
    """Trains one `W`, (m, n), of m <= n."""

    rank: int
    lr: float = 1e-2
    scale: float = 0.25
    gap: int = 200  # steps between two bases
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    wd: float = 0.0
    basis: Callable[[np.ndarray, int], np.ndarray] = leading_directions

    t: int = 0
    P: np.ndarray | None = None  # (m, rank)
    M: np.ndarray | float = 0.0  # (rank, n)
    V: np.ndarray | float = 0.0  # (rank, n)

    def step(self, W: np.ndarray, G: np.ndarray) -> np.ndarray:
        """`W` after one step along its gradient `G`."""
        if self.t % self.gap == 0:
            self.P = self.basis(G, self.rank)  # renew the subspace, keep the moments
        self.t += 1
        R = self.P.T @ G  # project
        self.M = self.b1 * self.M + (1 - self.b1) * R
        self.V = self.b2 * self.V + (1 - self.b2) * R**2
        M = self.M / (1 - self.b1**self.t)
        V = self.V / (1 - self.b2**self.t)
        U = M / (np.sqrt(V) + self.eps)  # Adam, in coordinates
        return W - self.lr * (self.scale * self.P @ U + self.wd * W)  # lift


def main() -> None:
    """Finds a 64 x 96 matrix of rank 8 from products with it."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=(64, 8)) @ rng.normal(size=(8, 96))
    W, galore = np.zeros((64, 96)), Galore(rank=8, lr=0.4, gap=20)
    for step in range(201):
        x = rng.normal(size=(256, 64))
        error = x @ (W - target)
        if step % 50 == 0:
            print(f"step {step:3}: mean squared error {np.mean(error**2):10.5f}")
        W = galore.step(W, x.T @ error / len(x))


if __name__ == "__main__":
    main()
