# SPDX-License-Identifier: Apache-2.0
"""What a LAPACK or BLAS call costs the products around it, on CPU.

Products `(P G) Gᵀ` of LLaMA-130M's MLP shapes, alone and behind one call. The
library's own orthonormalisation is built on what this shows.

    python -m benchmarks.speed.blas_threads
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.lib import records
from benchmarks.lib.subjects import repeated
from benchmarks.speed import tables

RANK, M, N = 192, 768, 2048
REPEATS = 25


def milliseconds(f: Callable[..., Any], *arguments: Any) -> float:
    return 1e3 * statistics.median(repeated(jax.jit(f), *arguments, repeats=REPEATS))


def products(basis: jax.Array, gradient: jax.Array) -> jax.Array:
    return (basis @ gradient) @ gradient.T


def cholesky(matrix: jax.Array) -> jax.Array:
    return jnp.linalg.cholesky(matrix)


def triangular(matrix: jax.Array) -> jax.Array:
    return jax.scipy.linalg.solve_triangular(matrix, jnp.eye(len(matrix)), lower=True)


def behind(call: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    def both(matrix: jax.Array, basis: jax.Array, gradient: jax.Array) -> jax.Array:
        return products(basis + 1e-9 * call(matrix)[0, 0], gradient)

    return both


def main() -> None:
    basis, gradient = jnp.ones((RANK, M)), jnp.ones((M, N))
    found = {"products alone": milliseconds(products, basis, gradient)}
    for call, sizes in ((cholesky, (64, 192, 200, 256)), (triangular, (8, 64, 192))):
        for size in sizes:
            matrix, name = 2 * jnp.eye(size), f"{call.__name__} {size}"
            found[name] = milliseconds(call, matrix)
            both = milliseconds(behind(call), matrix, basis, gradient)
            found[f"products behind {name}, less its own"] = both - found[name]
    print(tables.blas_threads(found))
    records.write("speed/blas_threads", found)


if __name__ == "__main__":
    main()
