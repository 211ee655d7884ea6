# SPDX-License-Identifier: Apache-2.0
"""APOLLO: the gradient itself, scaled as the inner scales its projection."""

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

Granularity = Literal["channel", "tensor"]

_EPS = 1e-8  # of the authors' code


@dataclasses.dataclass(frozen=True)
class _Apollo:
    gamma: Scalar
    granularity: Granularity
    instead: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self) -> None:
        check_gamma("apollo", self.gamma)
        check_word("apollo", "granularity", self.granularity, get_args(Granularity))

    def of(self, step: Step, norms: jax.Array) -> tuple[Added, jax.Array]:
        found = step.lengths(step.direction), step.lengths(step.coordinates)
        if self.granularity == "tensor":
            found = step.of_matrix(found[0]), step.of_matrix(found[1])
        columns = step.scale * (found[0] / (found[1] + _EPS))
        return limited(step, Added(columns, None), norms, self.gamma)


def apollo(*, gamma: Scalar = 1.01, granularity: Granularity = "channel") -> Residual:
    r"""The whole gradient in place of the lifted update, scaled by what is projected.

    With :math:`R = P^T G` and :math:`N = \mathrm{inner}(R)`, for column i

    .. math:: s_i = \frac{\|N_i\|}{\|R_i\| + 10^{-8}}, \quad
        S = \mathrm{scale} \cdot G\,\mathrm{diag}(s), \quad
        \|S\| \le \gamma \|S_{before}\|, \quad \Delta W = -lr\,S,

    or one s for all columns, of the norms of N and R. The projection only estimates
    how long the inner's update is, for which a random one will do
    (:func:`galore_optax.subspace.gaussian`), and nothing is lifted. Where S would grow
    by more than gamma in a step it is shortened, and the norm it has then is
    remembered: one number a matrix. It needs the whole gradient, an inner that is only
    the direction (`optax.scale_by_adam()`), with the learning rate around galore, and
    one side that is not projected. `apollo_adamw` and `apollo_mini_adamw` are
    ready-made.

    Args:
      gamma: the most the norm of S may grow in a step; `math.inf` for no limit.
      granularity: `"channel"` for a factor a column, `"tensor"` for one a matrix, which
        a rank of 1 is enough for.

    Returns:
      an object for `galore(residual=...)`.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> import galore_optax, optax
      >>> tx = optax.chain(
      ...     galore_optax.galore(
      ...         optax.scale_by_adam(), rank=4, scale=1.0,
      ...         subspace=galore_optax.subspace.gaussian(),
      ...         residual=galore_optax.residual.apollo()),
      ...     optax.scale_by_learning_rate(1e-2))

    Source: Zhu et al., APOLLO, arXiv 2412.05270, Algorithm 1.
    """
    return _Apollo(gamma, granularity)
