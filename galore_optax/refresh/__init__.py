# SPDX-License-Identifier: Apache-2.0
"""Rules that say how long a matrix keeps its basis.

Each function returns a small frozen object that follows `RefreshRule`; anything else
that does so can be passed to `galore(refresh=...)`. Without one, bases are renewed
every `update_proj_gap` steps.
"""

from galore_optax.refresh._base import RefreshRule as RefreshRule
from galore_optax.refresh.lazy import lazy as lazy
