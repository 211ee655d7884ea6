# SPDX-License-Identifier: Apache-2.0
"""How moments are stored in eight bits; one module a code.

Each function returns an object for `galore_optax.quantized(..., code=...)`. `Code` is
the protocol to write one of your own.
"""

from galore_optax.codes._base import Code as Code
from galore_optax.codes._base import Quantized as Quantized
from galore_optax.codes.companded import companded as companded
from galore_optax.codes.dynamic import dynamic as dynamic
