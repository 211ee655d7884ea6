# SPDX-License-Identifier: Apache-2.0
"""Singular vectors drawn by their singular values."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax.subspace._base import Subspace


@dataclasses.dataclass(frozen=True)
class _SARA:
    orthonormal: bool = dataclasses.field(default=True, init=False)

    def basis(
        self,
        gradient: jax.Array,
        previous: jax.Array,
        key: jax.Array,
        cold: jax.Array,
    ) -> jax.Array:
        del cold
        u, s, _ = jnp.linalg.svd(gradient, full_matrices=False)
        # The largest of log weights with Gumbel noise are a draw without replacement.
        drawn = jnp.log(s) + jax.random.gumbel(key, s.shape, s.dtype)
        _, chosen = lax.top_k(drawn, previous.shape[1])
        return u[:, jnp.sort(chosen)]


def sara() -> Subspace:
    r"""Left singular vectors, drawn without replacement by their singular values.

    .. math:: G = U S V^T, \quad P = U_I, \quad
        \Pr(i\text{ is drawn next}) = \sigma_i / \sum_{j \notin I} \sigma_j,

    in their order. Leading subspaces of successive gradients overlap much, so that
    GaLore moves in few directions; here every direction has its turn. It needs all of
    the spectrum, and takes as long as `svd`. Vectors have arbitrary signs and change
    places: with moments that rotate neither matters.

    Returns:
      a subspace method.

    Example:
      >>> import galore_optax, optax
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3), rank=4, subspace=galore_optax.subspace.sara(),
      ...     moments=galore_optax.moments.rotate())

    Source: SARA, also I3S, arXiv 2502.05790; Gumbel top-k: Kool et al., arXiv
    1903.06059.
    """
    return _SARA()
