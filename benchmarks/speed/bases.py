# SPDX-License-Identifier: Apache-2.0
"""One new basis by one subspace method: seconds, captured energy, orthonormality.

    seconds of a refresh = update(..., refresh=True) - update(..., refresh=False)

of a filter, an optimizer without moments. The gradient has turned (0.8 old + 0.6 new)
since the refresh before.
"""

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from benchmarks.lib.shapes import gradient, turned
from benchmarks.lib.subjects import timed
from galore_optax import subspace

METHODS = {
    "power": subspace.power(),
    "power, f32 products": subspace.power(product_dtype=jnp.float32),
    "randomized": subspace.randomized(),
    "eigh": subspace.eigh(),
    "svd": subspace.svd(),
    "random": subspace.random(),
}
SECONDS = 20.0  # a measurement is repeated until it has taken so long
MOST = 5  # and so often at most


@dataclasses.dataclass(frozen=True)
class Basis:
    """One matrix, whose basis is found by one method."""

    method: str
    shape: tuple[int, int]
    rank: int
    dtype: str = "float32"

    def __str__(self) -> str:
        m, n = self.shape
        return f"{m} x {n} {self.dtype}, rank {self.rank}: {self.method}"

    def measure(self) -> dict[str, Any]:
        """Of the first refresh, and of later ones, which start from a basis."""
        tx = galore_optax.galore(
            optax.identity(),
            rank=self.rank,
            subspace=METHODS[self.method],
            projector_dtype=jnp.float32,
        )
        first, second = (gradient(jax.random.key(i), self.shape) for i in (1, 2))
        one = {"kernel": first.astype(self.dtype)}
        now = {"kernel": turned(first, second).astype(self.dtype)}
        state = jax.eval_shape(tx.init, one)
        programs = [_update(tx, refresh).lower(one, state) for refresh in (True, False)]
        seconds, (renew, keep) = timed(lambda: [x.compile() for x in programs])
        state = tx.init(one)
        steady, _ = _median(lambda: keep(one, state)[1])
        cold, state = timed(lambda: renew(one, state)[1])
        warm, after = _median(lambda: renew(now, state)[1])
        return {
            **dataclasses.asdict(self),
            "compile_seconds": seconds,
            "steady_seconds": steady,
            "first_refresh_seconds": cold - steady,
            "refresh_seconds": warm - steady,
            "energy": float(galore_optax.captured_energy(tx, after, now)["kernel"]),
            "orthonormality": _error(after.projector["kernel"]),
        }


def _update(tx: optax.GradientTransformation, refresh: bool) -> Any:
    return jax.jit(
        lambda gradients, state: tx.update(gradients, state, refresh=refresh)
    )


def _median(step: Callable[[], Any]) -> tuple[float, Any]:
    """Median seconds, and the state after the last."""
    times: list[float] = []
    while not times or (sum(times) < SECONDS and len(times) < MOST):
        seconds, state = timed(step)
        times.append(seconds)
    return statistics.median(times), state


def _error(basis: jax.Array) -> float:
    gram = jnp.matmul(basis.T, basis, precision="highest")
    return float(jnp.abs(gram - jnp.eye(len(gram))).max())
