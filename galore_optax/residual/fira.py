# SPDX-License-Identifier: Apache-2.0
"""Fira: the residual in the inner's own proportions."""

import dataclasses
from typing import Literal, get_args

import jax

from galore_optax._types import Scalar
from galore_optax.residual._base import (
    Added,
    Residual,
    Step,
    check_gamma,
    check_word,
    limited,
)

Definition = Literal["orthogonal", "scaled"]

_EPS = 1e-8  # of the publication


@dataclasses.dataclass(frozen=True)
class _Fira:
    gamma: Scalar
    definition: Definition
    instead: bool = dataclasses.field(default=False, init=False)

    def __post_init__(self) -> None:
        check_gamma("fira", self.gamma)
        check_word("fira", "definition", self.definition, get_args(Definition))

    def of(self, step: Step, norms: jax.Array) -> tuple[Added, jax.Array]:
        part = 1.0 if self.definition == "orthogonal" else step.scale
        length = step.lengths(step.coordinates) + _EPS
        columns = step.lengths(step.direction) / length
        inside = -part * step.over_rank(columns) * step.coordinates
        return limited(step, Added(columns, inside), norms, self.gamma)


def fira(*, gamma: Scalar = 1.01, definition: Definition = "orthogonal") -> Residual:
    r"""Adds what the projection leaves out, each column as long as the inner has it.

    With :math:`R = P^T G` and :math:`N = \mathrm{inner}(R)`, for column i

    .. math:: S_i = \frac{\|N_i\|}{\|R_i\| + 10^{-8}} (G - P R)_i, \quad
        \|S\| \le \gamma \|S_{before}\|, \quad
        \Delta W = -lr\,(\mathrm{scale} \cdot P N + S).

    Where S would grow by more than gamma in a step it is shortened, and the norm it has
    then is remembered: one number a matrix. It needs the whole gradient, an inner that
    is only the direction (`optax.scale_by_adam()`), with the learning rate around
    galore, and one side that is not projected. `fira_adamw` is ready-made.

    Args:
      gamma: the most a residual's norm may grow in a step; `math.inf` for no limit.
      definition: `"orthogonal"` for G - P R, as published; `"scaled"` for
        G - scale P R, as the authors' code computes it, which leaves a part of the
        subspace in.

    Returns:
      an object for `galore(residual=...)`.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> import galore_optax, optax
      >>> tx = optax.chain(
      ...     galore_optax.galore(
      ...         optax.scale_by_adam(), rank=4, residual=galore_optax.residual.fira()),
      ...     optax.scale_by_learning_rate(1e-2))

    Source: Chen et al., Fira, arXiv 2410.01623, equations for the scaling and the
    norm-growth limiter.
    """
    return _Fira(gamma, definition)
