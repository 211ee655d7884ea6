# SPDX-License-Identifier: Apache-2.0
"""First moments projected from their old basis on the new one."""

import dataclasses

import jax

from galore_optax.moments._base import AtRefresh, Moment


@dataclasses.dataclass(frozen=True)
class _Transfer:
    moves: bool = dataclasses.field(default=True, init=False)
    turns: bool = dataclasses.field(default=True, init=False)
    rotates: bool = dataclasses.field(default=False, init=False)
    align_signs: bool = dataclasses.field(default=False, init=False)

    def moved(self, moment: Moment) -> jax.Array:
        return moment.turned(moment.value) if moment.signed else moment.value


def transfer() -> AtRefresh:
    r"""First moments are lifted from the old basis and projected on the new one.

    .. math:: m \leftarrow P_{new}^T P_{old}\, m, \quad v \leftarrow v

    Bases need not be orthonormal: between Gaussian ones the lifted moment, P m, stays
    what it was in expectation. Second moments stay numbers of the old basis; `rotate`
    turns them too, and says which arrays are which.

    Returns:
      an object for `galore(moments=...)`.

    Example:
      >>> import galore_optax, optax
      >>> flora = optax.chain(
      ...     galore_optax.galore(
      ...         optax.ema(0.9, debias=False), rank=4, scale=1.0, update_proj_gap=1000,
      ...         subspace=galore_optax.subspace.gaussian(),
      ...         moments=galore_optax.moments.transfer()),
      ...     optax.adafactor(1e-3))

    Source: Flora, arXiv 2402.03293; GoLore, arXiv 2410.11289.
    """
    return _Transfer()
