# SPDX-License-Identifier: Apache-2.0
"""GaLore's family for one matrix in NumPy, f64, written from the published formulas."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Basis = Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass
class Adam:
    """Adam on `R = P₁ᵀ G P₂`, where `left` and `right` say which there is."""

    rank: int
    gap: int
    basis: Basis
    left: bool = True
    right: bool = False
    moments: str = "keep"
    scale: float = 0.25
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    t: int = 0
    P: list[np.ndarray] | None = None
    M: Any = 0.0
    V: Any = 0.0

    def direction(self, G: np.ndarray) -> np.ndarray:
        """What is multiplied by minus the learning rate."""
        return self.scale * self._lift(self.inner(self.renewed(G)))

    def renewed(self, G: np.ndarray) -> np.ndarray:
        """The coordinates of `G`, in new bases every `gap` steps."""
        if self.t % self.gap == 0:
            old, self.P = self.P, self._bases(G, self.P)
            if old is not None:
                self._carry([new.T @ x for new, x in zip(self.P, old, strict=True)])
        return self._project(G)

    def inner(self, R: np.ndarray) -> np.ndarray:
        self.t += 1
        self.M = self.b1 * self.M + (1 - self.b1) * R
        self.V = self.b2 * self.V + (1 - self.b2) * R**2
        return self._mean() / (np.sqrt(self._square()) + self.eps)

    def _mean(self) -> np.ndarray:
        return self.M / (1 - self.b1**self.t)

    def _square(self) -> np.ndarray:
        return self.V / (1 - self.b2**self.t)

    def _bases(self, G: np.ndarray, old: Any) -> list[np.ndarray]:
        sides = [G] * self.left + [G.T] * self.right
        found = [self.basis(side, self.rank) for side in sides]
        if self.moments != "keep, signs aligned":
            return found
        identity = np.eye(max(G.shape))
        before = old or [identity[: len(x), : self.rank] for x in found]
        return [
            new * np.where(np.sum(new * x, axis=0) < 0, -1, 1)
            for new, x in zip(found, before, strict=True)
        ]

    def _carry(self, Q: list[np.ndarray]) -> None:
        if self.moments == "reset":
            self.M, self.V = 0 * self.M, 0 * self.V
        if self.moments == "transfer":  # GoLore, and Flora, which has no V
            self.M = self._turn(Q, self.M)
        if self.moments == "rotate":  # LDAdam, Algorithm 1
            mean, square = self._mean(), self._square()
            squares = [q**2 for q in Q]
            turned = self._turn(squares, square - mean**2) + self._turn(Q, mean) ** 2
            self.M = self._turn(Q, self.M)
            self.V = (1 - self.b2**self.t) * np.abs(turned)

    def _turn(self, Q: list[np.ndarray], x: np.ndarray) -> np.ndarray:
        Q = list(Q)
        x = Q.pop(0) @ x if self.left else x
        return x @ Q.pop(0).T if self.right else x

    def _project(self, G: np.ndarray) -> np.ndarray:
        P = list(self.P or ())
        G = P.pop(0).T @ G if self.left else G
        return G @ P.pop(0) if self.right else G

    def _lift(self, R: np.ndarray) -> np.ndarray:
        P = list(self.P or ())
        R = P.pop(0) @ R if self.left else R
        return R @ P.pop(0).T if self.right else R


@dataclasses.dataclass
class _Limited(Adam):
    """The norm-growth limiter of Fira and APOLLO."""

    gamma: float = 1.01
    before: float | None = None
    limits: int = 0

    def limited(self, S: np.ndarray) -> np.ndarray:
        norm = np.linalg.norm(S)
        if self.before is not None and norm > self.gamma * self.before:
            S, norm = S / norm * self.gamma * self.before, self.gamma * self.before
            self.limits += 1
        self.before = norm
        return S

    def column_norms(self, x: np.ndarray) -> np.ndarray:
        return np.linalg.norm(x, axis=0 if self.left else 1, keepdims=True)


@dataclasses.dataclass
class Fira(_Limited):
    """Its residual, scaled by columns, and its limiter."""

    kept: float = 1.0  # what is taken out of the gradient, of its part in the subspace

    def direction(self, G: np.ndarray) -> np.ndarray:
        R = self.renewed(G)
        N = self.inner(R)
        factors = self.column_norms(N) / (self.column_norms(R) + 1e-8)
        S = self.limited((G - self.kept * self._lift(R)) * factors)
        return self.scale * self._lift(N) + S


@dataclasses.dataclass
class Apollo(_Limited):
    """The gradient, scaled by columns, or whole in APOLLO-Mini, and its limiter."""

    granularity: str = "channel"

    def direction(self, G: np.ndarray) -> np.ndarray:
        R = self.renewed(G)
        N = self.inner(R)
        norms = self.column_norms if self.granularity == "channel" else np.linalg.norm
        return self.limited(self.scale * G * (norms(N) / (norms(R) + 1e-8)))


@dataclasses.dataclass
class LDAdam(Adam):
    """Bases from momentum and gradient; moments rotated; errors fed back."""

    moments: str = "rotate"
    scale: float = 1.0
    rho: float = 0.908
    feedback: bool = True
    e: Any = 0.0

    def direction(self, G: np.ndarray) -> np.ndarray:
        A = G + self.e
        before = self._lift(self.M) if self.t else 0 * A
        mean = before / (1 - self.b1**self.t) if self.t else before
        self.renewed(self.rho * mean + (1 - self.rho) * A)
        left = A + self.b1 / (1 - self.b1) * before
        turned = self._lift(self.M) if self.t else 0 * A
        R = self._project(A)
        if self.feedback:
            inside = self._lift(R) + self.b1 / (1 - self.b1) * turned
            self.e = left - inside
        return self.scale * self._lift(self.inner(R))


@dataclasses.dataclass
class Muon(Adam):
    """The momentum in coordinates, orthogonalised by Newton and Schulz."""

    beta: float = 0.95
    factor: float = 1.0  # by the shape of the weights
    steps: int = 5

    def inner(self, R: np.ndarray) -> np.ndarray:
        self.t += 1
        self.M = self.beta * self.M + (1 - self.beta) * R
        ahead = self.beta * self.M / (1 - self.beta ** (self.t + 1))
        now = (1 - self.beta) * R / (1 - self.beta**self.t)
        return self.factor * newton_schulz(ahead + now, self.steps)


@dataclasses.dataclass
class Raw(Adam):
    """The residual of SUMO, as it is."""

    def direction(self, G: np.ndarray) -> np.ndarray:
        R = self.renewed(G)
        return self.scale * self._lift(self.inner(R)) + G - self._lift(R)


@dataclasses.dataclass
class Sumo(Raw, Muon):
    """Around an orthogonalised momentum."""


def newton_schulz(X: np.ndarray, steps: int) -> np.ndarray:
    """Muon's quintic iteration."""
    if X.shape[0] > X.shape[1]:
        return newton_schulz(X.T, steps).T
    X = X / (np.linalg.norm(X) + 1e-8)
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X + (-4.775 * A + 2.0315 * A @ A) @ X
    return X
