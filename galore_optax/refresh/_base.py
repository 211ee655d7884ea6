# SPDX-License-Identifier: Apache-2.0
"""The protocol of a refresh rule."""

from typing import Protocol, runtime_checkable

import jax


@runtime_checkable
class RefreshRule(Protocol):
    """How long a matrix keeps its basis, decided whenever it takes a new one.

    Implementations must not be callable (`optax.inject_hyperparams` would call them); a
    frozen dataclass is not.
    """

    def rest(self, overlap: jax.Array, before: jax.Array) -> jax.Array:
        """After how many gaps of `update_proj_gap` steps the next refresh is due.

        Args:
          overlap: (matrices,), between 0 and 1: `|P_newᵀ P_old|² / r` in Frobenius'
            norm; of matrices with two bases the smaller one.
          before: (matrices,), int32: what was decided for the old basis, 1 at first.

        Returns:
          (matrices,), int32, at least 1.
        """
        ...
