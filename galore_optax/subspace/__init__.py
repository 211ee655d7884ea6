# SPDX-License-Identifier: Apache-2.0
"""Subspace methods: how a projector is found from a gradient.

Each function returns a small frozen object that follows `Subspace`; anything else that
does so can be passed to `galore(subspace=...)`.
"""

from galore_optax.subspace._base import ByNumbers as ByNumbers
from galore_optax.subspace._base import ByProducts as ByProducts
from galore_optax.subspace._base import ByStep as ByStep
from galore_optax.subspace._base import Subspace as Subspace
from galore_optax.subspace.dct import dct as dct
from galore_optax.subspace.eigh import eigh as eigh
from galore_optax.subspace.gaussian import gaussian as gaussian
from galore_optax.subspace.golore import golore as golore
from galore_optax.subspace.power import power as power
from galore_optax.subspace.random import random as random
from galore_optax.subspace.randomized import randomized as randomized
from galore_optax.subspace.sara import sara as sara
from galore_optax.subspace.svd import svd as svd
