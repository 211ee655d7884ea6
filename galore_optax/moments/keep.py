# SPDX-License-Identifier: Apache-2.0
"""Moments kept as they are, as in the reference."""

import dataclasses

import jax

from galore_optax.moments._base import AtRefresh, Moment


@dataclasses.dataclass(frozen=True)
class _Keep:
    align_signs: bool
    moves: bool = dataclasses.field(default=False, init=False)
    turns: bool = dataclasses.field(default=False, init=False)
    rotates: bool = dataclasses.field(default=False, init=False)

    def moved(self, moment: Moment) -> jax.Array:
        return moment.value


def keep(*, align_signs: bool = False) -> AtRefresh:
    r"""Moments stay what they are, as in the reference: numbers in another basis.

    Good where a basis changes little. Its columns must keep their signs then, which
    `power` sees to, and an SVD does not: singular vectors have arbitrary ones, which
    two devices may choose differently. With `align_signs` column i of the new basis is
    multiplied by

    .. math:: \mathrm{sign}\,(P_{old}^T P_{new})_{ii}

    so that the same run is the same on both.

    Args:
      align_signs: see above; of columns orthogonal to their old ones nothing is known.

    Returns:
      an object for `galore(moments=...)`.

    Example:
      >>> import galore_optax, optax
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3), rank=4, subspace=galore_optax.subspace.svd(),
      ...     moments=galore_optax.moments.keep(align_signs=True))

    Source: Zhao et al., arXiv 2403.03507, Algorithm 2; the signs are ours.
    """
    return _Keep(align_signs)
