# SPDX-License-Identifier: Apache-2.0
"""APOLLO and APOLLO-Mini with AdamW, ready-made."""

import functools
import math
from collections.abc import Callable
from typing import Any, Unpack

import optax

from galore_optax import residual
from galore_optax._config import Projection
from galore_optax._galore import config_of, with_defaults, with_projection
from galore_optax._optimizers._descent import descent
from galore_optax._transform import projected
from galore_optax._types import Scalar
from galore_optax.subspace import gaussian

_APOLLO = {"scale": 1.0, "subspace": gaussian()}
_MINI = _APOLLO | {"rank": 1, "scale": math.sqrt(128)}


@functools.partial(with_projection, defaults=_APOLLO)
def apollo_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    gamma: Scalar = 1.01,
    **projection: Unpack[Projection],
) -> optax.GradientTransformationExtraArgs:
    r"""The gradient, each column as long as AdamW on a random projection makes it.

    .. math:: W \leftarrow W - lr\,(\mathrm{scale} \cdot G\,\mathrm{diag}(s) + wd\, W),
        \quad s_i = \frac{\|N_i\|}{\|R_i\| + 10^{-8}}, \quad
        N = \mathrm{adam}(R), \quad R = P^T G, \quad P_{ij} \sim N(0, 1 / r)

    with the norm of G diag(s) growing by no more than `gamma` in a step: see
    :func:`galore_optax.residual.apollo`. No projector is stored, but a seed a column.
    It needs whole gradients.

    Args:
      learning_rate: number or schedule; published with 1e-2.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment, as in Optax; the authors' code has
        1e-6 before the correction of bias.
      weight_decay: decoupled, multiplied by the learning rate and not by `scale`.
      mask: which leaves decay, as in `optax.adamw`; paths are those of params.
      gamma: the most the norm of an update may grow in a step.
      **projection: `rank`, `update_proj_gap` and all else that `galore` takes. Ranks of
        a quarter of the smaller dimension are published, and of an eighth. `scale`, 1
        if not given, is the publication's alpha, of which the authors' code is given
        the square. `subspace` is `subspace.gaussian()` if not given.

    Returns:
      the transformation; its state is a tuple whose first entry is a `GaLoreState`.

    Raises:
      TypeError: `mask` is one value; and as `galore`.
      ValueError: `gamma` is out of range; a `projector_dtype` is given without a
        `subspace` that stores projectors; and as `galore`.

    Example:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.apollo_adamw(1e-2, rank=4)
      >>> state = tx.init({"kernel": jnp.ones((16, 64))})
      >>> state[0].projector["kernel"].nbytes
      16

    Source: Zhu et al., APOLLO, arXiv 2412.05270, Algorithm 1.
    """
    adam = optax.scale_by_adam(b1, b2, eps)
    rule = residual.apollo(gamma=gamma)
    config = config_of(with_defaults(_APOLLO, projection), rule)
    low = projected(lambda plan: adam, config)
    return descent(low, config, learning_rate, weight_decay, mask)


@functools.partial(with_projection, defaults=_MINI)
def apollo_mini_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    gamma: Scalar = 1.01,
    **projection: Unpack[Projection],
) -> optax.GradientTransformationExtraArgs:
    r"""The gradient, each matrix as long as AdamW on one random direction makes it.

    .. math:: W \leftarrow W - lr\,(\mathrm{scale} \cdot s\, G + wd\, W),
        \quad s = \frac{\|N\|}{\|R\| + 10^{-8}}, \quad
        N = \mathrm{adam}(R), \quad R = P^T G, \quad P_i \sim N(0, 1)

    with the norm of s G growing by no more than `gamma` in a step: see
    :func:`galore_optax.residual.apollo`. The state of a matrix (m, n) with m <= n is
    2 n + 2 numbers, a seed among them, and two counters. It needs whole gradients.

    Args:
      learning_rate: number or schedule; published with 1e-2, and better with 2e-2.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment, as in Optax; the authors' code has
        1e-6 before the correction of bias.
      weight_decay: decoupled, multiplied by the learning rate and not by `scale`.
      mask: which leaves decay, as in `optax.adamw`; paths are those of params.
      gamma: the most the norm of an update may grow in a step.
      **projection: `update_proj_gap` and all else that `galore` takes. If not given,
        `rank` is 1, `subspace` is `subspace.gaussian()`, and `scale`, the publication's
        alpha, is the root of 128; the authors' code is given the square.
        `moment_dtype=jnp.bfloat16` is what the publication counts memory with.

    Returns:
      the transformation; its state is a tuple whose first entry is a `GaLoreState`.

    Raises:
      TypeError: `mask` is one value; and as `galore`.
      ValueError: as `apollo_adamw`.

    Example:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.apollo_mini_adamw(1e-2)
      >>> state = tx.init({"kernel": jnp.ones((16, 64))})
      >>> state[0].inner_state.mu["kernel"].shape
      (1, 64)

    Source: Zhu et al., APOLLO, arXiv 2412.05270, section 4.2.
    """
    adam = optax.scale_by_adam(b1, b2, eps)
    rule = residual.apollo(gamma=gamma, granularity="tensor")
    config = config_of(with_defaults(_MINI, projection), rule)
    low = projected(lambda plan: adam, config)
    return descent(low, config, learning_rate, weight_decay, mask)
