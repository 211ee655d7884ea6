# SPDX-License-Identifier: Apache-2.0
"""How arrays are stored in few bits; one module a code.

Moments: each function returns an object for `galore_optax.quantized(..., code=...)`,
and `Code` is the protocol to write one of your own. Projectors: `affine.py`, which
`projector_dtype` asks for.
"""

from galore_optax.codes._base import Code as Code
from galore_optax.codes._base import Quantized as Quantized
from galore_optax.codes.companded import companded as companded
from galore_optax.codes.dynamic import dynamic as dynamic
