# SPDX-License-Identifier: Apache-2.0
"""The protocol of a subspace method, and the linear algebra that methods share."""

from typing import Protocol, runtime_checkable

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
