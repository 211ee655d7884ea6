# SPDX-License-Identifier: Apache-2.0
"""Clipping by a norm that is only known when every layer has been seen."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Clip:
    """What is measured, and the largest norm allowed."""

    max_norm: float
    projected: bool

    def __post_init__(self) -> None:
        if not (self.max_norm > 0 and math.isfinite(self.max_norm)):
            raise ValueError(
                f"max_norm={self.max_norm} must be positive and finite. To clip"
                " nothing, give make_step(..., clip=None)."
            )


def clip_by_global_norm(max_norm: float) -> Clip:
    """Scales all gradients down to a global norm, as `optax.clip_by_global_norm` does.

    Exact, for a second backward pass: the first only measures.

    Args:
      max_norm: of all gradients together, positive.

    Returns:
      for `make_step(..., clip=...)`.

    Raises:
      ValueError: `max_norm` is not positive.

    Example:
      >>> from galore_optax import layerwise
      >>> clip = layerwise.clip_by_global_norm(1.0)

    Source: Pascanu et al., arXiv 1211.5063, algorithm 1.
    """
    return Clip(max_norm, projected=False)


def clip_by_projected_norm(max_norm: float) -> Clip:
    """Scales all gradients down to a norm of their coordinates, in one backward pass.

    .. math:: \\sqrt{\\sum_l \\|P_l^T G_l\\|_F^2 + \\sum_k \\|G_k\\|_F^2}

    over projected leaves l and others k. At most the global norm, since projections
    shorten; coordinates of all layers are held until it is known.

    Args:
      max_norm: positive.

    Returns:
      for `make_step(..., clip=...)`.

    Raises:
      ValueError: `max_norm` is not positive.

    Example:
      >>> from galore_optax import layerwise
      >>> clip = layerwise.clip_by_projected_norm(1.0)
    """
    return Clip(max_norm, projected=True)
