# SPDX-License-Identifier: Apache-2.0
"""Every subspace method on one device: orthonormality, captured energy, seconds."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from benchmarks.lib.subjects import gradient, turned
from galore_optax import subspace

METHODS = {
    "power": subspace.power(),
    "power, f32 products": subspace.power(product_dtype=jnp.float32),
    "randomized": subspace.randomized(),
    "eigh": subspace.eigh(),
    "svd": subspace.svd(),
    "random": subspace.random(),
}
REPEATS = 3


@dataclasses.dataclass(frozen=True)
class Probe:
    """One matrix, whose basis is found by one method."""

    method: str
    shape: tuple[int, int]
    rank: int
    dtype: str

    def __str__(self) -> str:
        m, n = self.shape
        return f"{m} x {n} {self.dtype}, rank {self.rank}: {self.method}"

    def measure(self) -> dict[str, Any]:
        """The first basis, and later ones of a gradient that has turned."""
        tx = galore_optax.galore(
            optax.identity(),
            rank=self.rank,
            subspace=METHODS[self.method],
            projector_dtype=jnp.float32,
        )
        one, two = ({"kernel": gradient(jax.random.key(i), self.shape)} for i in (1, 2))
        now = _as(turned(one, two), self.dtype)
        one = _as(one, self.dtype)
        renew = jax.jit(lambda g, s: tx.update(g, s, refresh=True)[1])
        first, state = _timed(renew, one, tx.init(one))
        cold, _ = _timed(renew, one, tx.init(one))
        runs = [_timed(renew, now, state) for _ in range(REPEATS)]
        later = runs[-1][1]
        energy = galore_optax.captured_energy(tx, later, now)["kernel"]
        return {
            **dataclasses.asdict(self),
            "orthonormality": _error(later.projector["kernel"]),
            "energy": float(energy),
            "first_call_seconds": first,  # compiled and run
            "first_refresh_seconds": cold,
            "refresh_seconds": min(seconds for seconds, _ in runs),
        }


def _as(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def _timed(renew: Any, gradients: Any, state: Any) -> tuple[float, Any]:
    jax.block_until_ready((gradients, state))
    start = time.perf_counter()
    found = jax.block_until_ready(renew(gradients, state))
    return time.perf_counter() - start, found


def _error(basis: jax.Array) -> float:
    gram = jnp.matmul(basis.T, basis, precision="highest")
    return float(jnp.abs(gram - jnp.eye(len(gram))).max())
