# SPDX-License-Identifier: Apache-2.0
"""Refreshes that become rarer where the subspace stands still."""

import dataclasses

import jax
import jax.numpy as jnp

from galore_optax.refresh._base import RefreshRule


@dataclasses.dataclass(frozen=True)
class _Lazy:
    overlap: float
    most: int

    def __post_init__(self) -> None:
        if not 0 < self.overlap <= 1:
            raise ValueError(
                f"lazy(overlap={self.overlap!r}) must be above 0 and at most 1, the"
                " overlap of a subspace with itself."
            )
        if isinstance(self.most, bool) or self.most != int(self.most) or self.most < 1:
            raise ValueError(f"lazy(most={self.most!r}) must be a positive int.")

    def rest(self, overlap: jax.Array, before: jax.Array) -> jax.Array:
        longer = jnp.minimum(2 * before, int(self.most))
        return jnp.where(overlap >= self.overlap, longer, 1).astype(before.dtype)


def lazy(*, overlap: float = 0.8, most: int = 8) -> RefreshRule:
    r"""Twice as long a rest wherever a new subspace is much like the old one.

    Whenever a matrix takes a new basis,

    .. math:: o = \|P_{new}^T P_{old}\|_F^2 / r, \quad
        \mathrm{rest} \leftarrow \min(2\, \mathrm{rest}, \mathrm{most})
        \text{ if } o \ge \mathrm{overlap} \text{, else } 1,

    and its next refresh is due after so many gaps of `update_proj_gap` steps. Each
    matrix decides for itself, in the graph; `state.refresh.rest` shows it. The
    published rule goes by the first singular vector alone, whose sign is arbitrary,
    with a mean of several refreshes against 0.4, and never shortens a rest.

    Args:
      overlap: of two subspaces; random ones have r / m, the same one has 1.
      most: the longest rest, in gaps.

    Returns:
      an object for `galore(refresh=...)`.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3), rank=4, refresh=galore_optax.refresh.lazy())
      >>> tx.init({"kernel": jnp.ones((16, 64))}).refresh.rest["kernel"].item()
      1

    Source: after Q-GaLore, arXiv 2407.08296, section 3.2.
    """
    return _Lazy(overlap, most)
