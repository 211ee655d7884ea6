# SPDX-License-Identifier: Apache-2.0
"""What becomes of the inner's moments when their matrix takes a new basis.

Each function returns a small frozen object that follows `AtRefresh`; anything else that
does so can be passed to `galore(moments=...)`.
"""

from galore_optax.moments._base import AtRefresh as AtRefresh
from galore_optax.moments._base import Moment as Moment
from galore_optax.moments.keep import keep as keep
from galore_optax.moments.reset import reset as reset
from galore_optax.moments.rotate import rotate as rotate
from galore_optax.moments.transfer import transfer as transfer
