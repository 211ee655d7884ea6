# SPDX-License-Identifier: Apache-2.0
"""The protocol of a subspace method, and the linear algebra that methods share."""

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax


@runtime_checkable
class Subspace(Protocol):
    """A way to find the `rank` directions a gradient is projected on.

    Implementations must be hashable and must not be callable
    (`optax.inject_hyperparams` would call them); a frozen dataclass does both.

    Attributes:
      orthonormal: whether every basis satisfies `PᵀP = I`. If so it is checked, and a
        basis that fails is refused: the matrix keeps its old one and tries again.
    """

    @property
    def orthonormal(self) -> bool: ...

    def basis(
        self,
        gradient: jax.Array,
        previous: jax.Array,
        key: jax.Array,
        cold: jax.Array,
    ) -> jax.Array:
        """Finds a basis for one matrix.

        Args:
          gradient: (m, n), f32 or f64, finite, its largest entry 1 in size; its
            *columns'* space is the one to describe.
          previous: (m, rank), the basis in use, `rank <= min(m, n)`; as orthonormal as
            `projector_dtype` has left it.
          key: a PRNG key, different for every matrix and step.
          cold: bool scalar; whether `previous` is the initial slice of the identity.

        Returns:
          (m, rank), of the dtype of `gradient`.
        """
        ...


@runtime_checkable
class ByProducts(Subspace, Protocol):
    """A method that needs no more of a gradient than products with it.

    Where the gradient itself is never formed, each product is a pass over the model
    that makes those of all matrices. Vectors are rows:

        X = start(...), (width, m)
        passes(cold) times:  Y = right(X G), (width, n);  X = Y Gᵀ,
                             and between two of them      X = between(X)
        P = finish(X, ...)ᵀ, (m, rank)
    """

    def passes(self, cold: jax.Array) -> int | jax.Array:
        """How many pairs of products; a static 0 where the gradient is not needed."""
        ...

    def start(
        self, shape: tuple[int, ...], previous: jax.Array, key: jax.Array, cold: Any
    ) -> jax.Array:
        """(width, m), for a gradient of `shape`; the rest is as in `basis`."""
        ...

    def right(self, coordinates: jax.Array) -> jax.Array:
        """(width, n) -> the same, so that no direction is lost to rounding."""
        ...

    def between(self, rows: jax.Array) -> jax.Array:
        """(width, m) -> the same, likewise."""
        ...

    def finish(self, rows: jax.Array, rank: int, key: jax.Array) -> jax.Array:
        """(width, m) -> (m, rank)."""
        ...


@runtime_checkable
class ByStep(Subspace, Protocol):
    """A method that finds bases in another way as training goes on."""

    def basis_at(
        self,
        step: jax.Array,
        gradient: jax.Array,
        previous: jax.Array,
        key: jax.Array,
        cold: jax.Array,
    ) -> jax.Array:
        """As `basis`, at `step`, int32 scalar: updates so far."""
        ...


@runtime_checkable
class ByNumbers(Subspace, Protocol):
    """A method whose columns are made of one number each, and never stored themselves.

    The state holds the numbers, 4 bytes a column. Every product makes the basis anew,
    so that `columns` must give the same one each time, on any number of devices.
    """

    def basis(
        self,
        gradient: jax.Array,
        previous: jax.Array,
        key: jax.Array,
        cold: jax.Array,
    ) -> jax.Array:
        numbers = self.numbers(gradient, previous, key, cold)
        return self.columns(numbers, len(gradient), gradient.dtype)

    def numbers(
        self,
        gradient: jax.Array,
        previous: jax.Array,
        key: jax.Array,
        cold: jax.Array,
    ) -> jax.Array:
        """(rank,), uint32: one number a column; the arguments are those of `basis`."""
        ...

    def columns(self, numbers: jax.Array, size: int, dtype: Any) -> jax.Array:
        """(size, rank) of `dtype`, from (rank,) numbers."""
        ...


def basis_by_products(
    method: ByProducts,
    gradient: jax.Array,
    previous: jax.Array,
    key: jax.Array,
    cold: jax.Array,
) -> jax.Array:
    """`method.basis`, from the gradient itself."""

    def product(rows: jax.Array) -> jax.Array:
        return matmul(method.right(matmul(rows, gradient)), gradient.T)

    rows, passes = (
        method.start(gradient.shape, previous, key, cold),
        method.passes(cold),
    )
    if not (isinstance(passes, int) and passes == 0):
        rows = lax.fori_loop(
            0, passes - 1, lambda _, x: product(method.between(x)), product(rows)
        )
    return method.finish(rows, previous.shape[1], key)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    # The default precision is TF32 on GPU and bf16 on TPU, which would leave a basis
    # orthonormal to three digits only.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def orthonormalise(columns: jax.Array) -> jax.Array:
    """An orthonormal basis of the span of `columns`, (m, rank), in their order.

    Householder QR: orthonormal whatever the condition. Signs are chosen so that the
    triangular factor has a positive diagonal: a basis that changes little between
    refreshes then keeps its orientation, and with it the meaning of carried moments.
    """
    q, r = jnp.linalg.qr(columns)
    signs = jnp.where(jnp.diagonal(r) < 0, -1, 1).astype(q.dtype)
    return q * signs[None]
