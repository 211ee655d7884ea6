# SPDX-License-Identifier: Apache-2.0
"""Fira with AdamW, ready-made."""

from collections.abc import Callable
from typing import Any, Unpack

import optax

from galore_optax import residual
from galore_optax._config import Projection
from galore_optax._galore import config_of, with_projection
from galore_optax._optimizers._descent import descent
from galore_optax._transform import projected
from galore_optax._types import Scalar
from galore_optax.residual.fira import Definition


@with_projection
def fira_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    gamma: Scalar = 1.01,
    definition: Definition = "orthogonal",
    **projection: Unpack[Projection],
) -> optax.GradientTransformationExtraArgs:
    r"""GaLore with AdamW, and the part of the gradient that the projection leaves out.

    .. math:: W \leftarrow W - lr\,(\mathrm{scale} \cdot P N + S + wd\, W), \quad
        N = \mathrm{adam}(P^T G), \quad
        S_i = \frac{\|N_i\|}{\|R_i\| + 10^{-8}} (G - P R)_i

    with the norm of S growing by no more than `gamma` in a step: see
    :func:`galore_optax.residual.fira`. The state is that of `galore_adamw` and one
    number a matrix. It needs whole gradients.

    Args:
      learning_rate: number or schedule; published with 1e-2.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment, as in Optax; the authors' code has
        1e-6 before the correction of bias.
      weight_decay: decoupled, multiplied by the learning rate and not by `scale`.
      mask: which leaves decay, as in `optax.adamw`; paths are those of params.
      gamma: the most a residual's norm may grow in a step.
      definition: of the residual, `"orthogonal"` as published or `"scaled"` as in the
        authors' code.
      **projection: `rank`, `update_proj_gap` and all else that `galore` takes. The
        authors' scripts have scale 0.25, and 0.0625 from 1B parameters on.

    Returns:
      the transformation; its state is a tuple whose first entry is a `GaLoreState`.

    Raises:
      TypeError: `mask` is one value; and as `galore`.
      ValueError: `gamma` or `definition` is out of range; and as `galore`.

    Example:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.fira_adamw(1e-2, rank=4)
      >>> state = tx.init({"kernel": jnp.ones((16, 64))})
      >>> state[0].residual["kernel"].shape
      ()

    Source: Chen et al., Fira, arXiv 2410.01623.
    """
    beside = residual.fira(gamma=gamma, definition=definition)
    config = config_of(projection, beside)
    low = projected(lambda plan: optax.scale_by_adam(b1, b2, eps), config)
    return descent(low, config, learning_rate, weight_decay, mask)
