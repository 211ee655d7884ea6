# SPDX-License-Identifier: Apache-2.0
"""What this machine does at best: its products at given shapes, its copies.

The floor of a step is built of these two:

    floor = sum over projections of FLOPs / rate at their shape + bytes / bandwidth
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.lib.shapes import Shapes
from benchmarks.lib.subjects import repeated, timed

REPEATS = 7
ITEMSIZE = 4  # f32
COPIED = 2**30  # bytes, more than any cache holds
PANEL = 2**21  # entries of a matrix that a product is timed on, which caches hold
DISPATCHED = 2e9  # FLOP at once
PASSES = 3  # an array of gradients or weights is read; weights are written too


@dataclasses.dataclass(frozen=True)
class Work:
    """What one steady step cannot do without."""

    projections: tuple[tuple[tuple[int, int, int], int], ...]  # (m, n, rank), how many
    bytes: int

    @property
    def flops(self) -> int:
        """Of projecting, PᵀG, and lifting, P U: 2 m n rank each."""
        return sum(4 * m * n * r * count for (m, n, r), count in self.projections)


def galore_work(shapes: Shapes, rank: int) -> Work:
    """One step of Adam in coordinates, each array moved once.

    A matrix' gradient and projector are read, its weights and both moments read and
    written; the rest is AdamW's. Coordinates and updates may stay in caches.
    """
    entries = 0
    for (m, n), count in shapes.matrices().items():
        entries += count * (PASSES * m * n + m * rank + 4 * rank * n)
    sides = shapes.matrices().items()
    projections = tuple(((m, n, rank), count) for (m, n), count in sides)
    return Work(projections, ITEMSIZE * entries + adamw_bytes(shapes.others()))


def adamw_work(shapes: Shapes) -> Work:
    sides = shapes.matrices().items()
    projected = sum(m * n * count for (m, n), count in sides)
    return Work((), adamw_bytes(projected + shapes.others()))


def adamw_bytes(parameters: int) -> int:
    """Gradients read; weights and two moments read and written."""
    return 7 * ITEMSIZE * parameters


@dataclasses.dataclass(frozen=True)
class Rates:
    """Measured: FLOP/s by (m, n, rank), and bytes read and written a second."""

    products: dict[tuple[int, int, int], float]
    bandwidth: float

    def floor(self, work: Work) -> float:
        """Seconds."""
        products = sum(
            count * 4 * m * n * r / self.products[m, n, r]
            for (m, n, r), count in work.projections
        )
        return products + work.bytes / self.bandwidth

    def best(self, other: "Rates") -> "Rates":
        """Of two measurements of the same."""
        products = {k: max(v, other.products[k]) for k, v in self.products.items()}
        return Rates(products, max(self.bandwidth, other.bandwidth))


def measure(work: Work, copied: int = COPIED) -> Rates:
    """The rates that the floor of `work` needs, of this machine, now."""
    products = {shape: product_rate(*shape) for shape, _ in work.projections}
    return Rates(products, max(bandwidths(copied).values()))


def product_rate(m: int, n: int, rank: int) -> float:
    """FLOP/s of `G ← P (Pᵀ G)` on columns in caches, of the better of two layouts."""
    n = min(n, PANEL // m)
    count = max(1, round(DISPATCHED / (4 * m * n * rank)))
    basis = jnp.eye(m, rank)
    wide, tall = jnp.ones((m, n)), jnp.ones((n, m))

    @jax.jit
    def left(basis: jax.Array, rows: jax.Array, x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, count, lambda _, x: basis @ (rows @ x), x)

    @jax.jit
    def right(basis: jax.Array, rows: jax.Array, x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, count, lambda _, x: (x @ basis) @ rows, x)

    rows = jnp.asarray(basis.T)
    seconds = repeated(left, basis, rows, wide, repeats=REPEATS)
    seconds += repeated(right, basis, rows, tall, repeats=REPEATS)
    return count * 4 * m * n * rank / min(seconds)


def bandwidths(size: int) -> dict[str, float]:
    """Bytes read and written a second, of an array of `size` bytes, by kind of copy."""
    in_place = jax.jit(jnp.negative, donate_argnums=0)
    array = jnp.ones(size // ITEMSIZE)
    out = min(repeated(jax.jit(jnp.negative), array, repeats=REPEATS))
    array, times = in_place(array), []
    for _ in range(REPEATS):
        seconds, array = timed(in_place, array)
        times.append(seconds)
    return {"in place": 2 * size / min(times), "elsewhere": 2 * size / out}
