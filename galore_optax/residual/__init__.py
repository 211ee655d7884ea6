# SPDX-License-Identifier: Apache-2.0
"""What an update takes from the gradient outside of the subspace.

Each function returns a small frozen object that follows `Residual`; anything else that
does so can be passed to `galore(residual=...)`. Each needs the whole gradient.
"""

from galore_optax.residual._base import Added as Added
from galore_optax.residual._base import Residual as Residual
from galore_optax.residual._base import Step as Step
from galore_optax.residual.apollo import apollo as apollo
from galore_optax.residual.fira import fira as fira
from galore_optax.residual.raw import raw as raw
