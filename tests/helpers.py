# SPDX-License-Identifier: Apache-2.0
"""Trees, gradients and a subspace method that several test files share."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax.subspace._base import orthonormalise

TILT = 8.0


@dataclasses.dataclass(frozen=True)
class Tilted:
    """The identity tilted by the gradient: a basis that NumPy computes just as well.

    It follows the gradient and is well conditioned, so that f32 finds it to rounding.
    """

    orthonormal: bool = True

    def basis(self, gradient: Any, previous: Any, key: Any, cold: Any) -> Any:
        del key, cold
        eye = jnp.eye(*previous.shape, dtype=gradient.dtype)
        return orthonormalise(gradient[:, : previous.shape[-1]] + TILT * eye)


@dataclasses.dataclass(frozen=True)
class Identity:
    """The leading slice of the identity, at every refresh."""

    orthonormal: bool = True

    def basis(self, gradient: Any, previous: Any, key: Any, cold: Any) -> Any:
        del key, cold
        return jnp.eye(*previous.shape, dtype=gradient.dtype)


def tilted(gradient: np.ndarray, rank: int) -> np.ndarray:
    """`Tilted` in NumPy."""
    unit = gradient / np.max(np.abs(gradient))
    q, r = np.linalg.qr(unit[:, :rank] + TILT * np.eye(len(gradient), rank))
    return q * np.where(np.diagonal(r) < 0, -1, 1)


def normal(seed: int, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """From NumPy: JAX compiles a program for every shape, in every process."""
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape), dtype)


def normal_like(tree: Any, seed: int) -> Any:
    leaves, treedef = jax.tree.flatten(tree)
    rngs = np.random.default_rng(seed).spawn(len(leaves))
    return treedef.unflatten(
        [
            jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
            for rng, leaf in zip(rngs, leaves, strict=True)
        ]
    )


def with_spectrum(seed: int, shape: tuple[int, int], values: Any) -> np.ndarray:
    """A matrix (f64) with random singular vectors and the given singular values."""
    rng = np.random.default_rng(seed)
    count = len(values)
    u, _ = np.linalg.qr(rng.normal(size=(shape[0], count)))
    v, _ = np.linalg.qr(rng.normal(size=(shape[1], count)))
    return (u * np.asarray(values)) @ v.T


def orthonormality(projector: Any) -> float:
    """The largest entry of |PᵀP - I| over a batch of projectors (..., m, rank)."""
    p = np.asarray(projector, np.float64)
    gram = np.swapaxes(p, -1, -2) @ p
    return float(np.max(np.abs(gram - np.eye(p.shape[-1]))))


def counters(tree: Any) -> list[int]:
    """Of every matrix, leaf by leaf."""
    return [int(x) for leaf in jax.tree.leaves(tree) for x in np.ravel(leaf)]
