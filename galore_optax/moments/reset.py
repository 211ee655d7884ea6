# SPDX-License-Identifier: Apache-2.0
"""Moments that begin anew in each basis."""

import dataclasses

import jax

from galore_optax.moments._base import AtRefresh, Moment


@dataclasses.dataclass(frozen=True)
class _Reset:
    moves: bool = dataclasses.field(default=True, init=False)
    turns: bool = dataclasses.field(default=False, init=False)
    rotates: bool = dataclasses.field(default=False, init=False)
    align_signs: bool = dataclasses.field(default=False, init=False)

    def moved(self, moment: Moment) -> jax.Array:
        return moment.initial


def reset() -> AtRefresh:
    r"""Moments of a matrix that took a new basis are what `init` made them.

    The inner's step count is one for all leaves and goes on, so that nothing corrects
    the bias of the young moments: with Adam's the first step after a reset, along a
    gradient g, is

    .. math:: \frac{1 - b_1}{\sqrt{1 - b_2}} \cdot \frac{g}{|g|},

    3.2 times as long as an ordinary one at the usual 0.9 and 0.999, and the twelfth,
    the longest, 6.6 times. A lower b2 tames it.

    Returns:
      an object for `galore(moments=...)`.

    Example:
      >>> import galore_optax, optax
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3, b2=0.95), rank=4, moments=galore_optax.moments.reset())

    Source: FRUGAL, arXiv 2411.07837; GRASS, arXiv 2406.17660.
    """
    return _Reset()
