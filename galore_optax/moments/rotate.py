# SPDX-License-Identifier: Apache-2.0
"""Moments turned with their basis."""

import dataclasses

import jax
import jax.numpy as jnp

from galore_optax.moments._base import AtRefresh, Moment


@dataclasses.dataclass(frozen=True)
class _Rotate:
    moves: bool = dataclasses.field(default=True, init=False)
    turns: bool = dataclasses.field(default=True, init=False)
    rotates: bool = dataclasses.field(default=True, init=False)
    align_signs: bool = dataclasses.field(default=False, init=False)

    def moved(self, moment: Moment) -> jax.Array:
        if moment.signed:
            return moment.turned(moment.value)
        variance = moment.turned_squares(moment.value - moment.mean**2)
        return jnp.abs(variance + moment.turned(moment.mean) ** 2)


def rotate() -> AtRefresh:
    r"""Moments are turned into the new basis, as if their gradients had been.

    With :math:`Q = P_{new}^T P_{old}`, and hats for moments without their bias,

    .. math:: m \leftarrow Q m, \quad v \leftarrow (1 - b_2^t)\,
        |(Q \circ Q)(\hat v - \hat m^2) + (Q \hat m)^2|,

    t the steps taken. The second takes coordinates for uncorrelated, their variance
    for v - m²; in an inner that has no first moment m is zero. The decays are read off
    the inner. Signs and permutations of the columns change nothing: runs with an exact
    SVD are the same on every device.

    Fields called `mu`, `trace` and `ema` are first moments, `nu` and the other unsigned
    ones that `quantized` knows second ones, beside a `mu` if there is one, and averages
    of squares. An inner whose state holds anything else for a projected leaf is
    refused by `init`.

    Returns:
      an object for `galore(moments=...)`.

    Example:
      >>> import galore_optax, optax
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3), rank=4, moments=galore_optax.moments.rotate())

    Source: Robert et al., LDAdam, arXiv 2410.16103, Algorithm 1.
    """
    return _Rotate()
