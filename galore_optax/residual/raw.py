# SPDX-License-Identifier: Apache-2.0
"""SUMO: the residual as it is."""

import dataclasses

import jax
import jax.numpy as jnp

from galore_optax.residual._base import Added, Residual, Step


@dataclasses.dataclass(frozen=True)
class _Raw:
    instead: bool = dataclasses.field(default=False, init=False)

    def of(self, step: Step, norms: jax.Array) -> tuple[Added, jax.Array]:
        ones = jnp.ones_like(step.lengths(step.coordinates))
        return Added(ones, -step.coordinates), norms


def raw() -> Residual:
    r"""Adds what the projection leaves out, unscaled: a step of gradient descent there.

    With :math:`R = P^T G` and :math:`N = \mathrm{inner}(R)`

    .. math:: \Delta W = -lr\,(\mathrm{scale} \cdot P N + G - P R).

    Nothing makes the residual as long as the inner's update is: where gradients are
    small beside that, it adds next to nothing. It needs what `fira` needs, and leaves
    the number a matrix that residuals remember as it is. With moments that rotate and
    an inner that orthogonalises, such as `optax.contrib.scale_by_muon`, it is SUMO.

    Returns:
      an object for `galore(residual=...)`.

    Example:
      >>> import galore_optax, optax
      >>> tx = optax.chain(
      ...     galore_optax.galore(
      ...         optax.scale_by_adam(), rank=4, residual=galore_optax.residual.raw()),
      ...     optax.scale_by_learning_rate(1e-2))

    Source: SUMO, arXiv 2505.24749, Algorithm 1.
    """
    return _Raw()
