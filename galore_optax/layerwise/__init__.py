# SPDX-License-Identifier: Apache-2.0
"""Training a layer at a time: each gradient is used and dropped as soon as it is there.

A model is given as three functions, before, in and after its repeated layers. The
backward pass is a loop over layers which forms one layer's gradient, runs the optimizer
on it and writes that layer's parameters and state in place, so that no more than one
layer's gradient exists at a time.
"""

from galore_optax.layerwise._clip import Clip as Clip
from galore_optax.layerwise._clip import clip_by_global_norm as clip_by_global_norm
from galore_optax.layerwise._clip import (
    clip_by_projected_norm as clip_by_projected_norm,
)
from galore_optax.layerwise._convert import convert_state as convert_state
from galore_optax.layerwise._modules import Structure as Structure
from galore_optax.layerwise._modules import split as split
from galore_optax.layerwise._parts import Params as Params
from galore_optax.layerwise._stack import stack as stack
from galore_optax.layerwise._stack import unstack as unstack
from galore_optax.layerwise._step import Report as Report
from galore_optax.layerwise._step import Step as Step
from galore_optax.layerwise._step import make_step as make_step
from galore_optax.layerwise._sweep import Model as Model
