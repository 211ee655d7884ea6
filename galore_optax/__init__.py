# SPDX-License-Identifier: Apache-2.0
"""GaLore as a composable Optax gradient transformation."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from galore_optax import codes as codes
from galore_optax import layerwise as layerwise
from galore_optax import memory as memory
from galore_optax import moments as moments
from galore_optax import refresh as refresh
from galore_optax import residual as residual
from galore_optax import subspace as subspace
from galore_optax._asking.describe import describe as describe
from galore_optax._asking.energy import captured_energy as captured_energy
from galore_optax._asking.metrics import metrics as metrics
from galore_optax._asking.overlap import basis_overlap as basis_overlap
from galore_optax._asking.schedule import refresh_schedule as refresh_schedule
from galore_optax._convert import convert_state as convert_state
from galore_optax._galore import galore as galore
from galore_optax._optimizers.adafactor import galore_adafactor as galore_adafactor
from galore_optax._optimizers.adamw import galore_adamw as galore_adamw
from galore_optax._optimizers.adamw import galore_adamw8bit as galore_adamw8bit
from galore_optax._optimizers.apollo import apollo_adamw as apollo_adamw
from galore_optax._optimizers.apollo import apollo_mini_adamw as apollo_mini_adamw
from galore_optax._optimizers.fira import fira_adamw as fira_adamw
from galore_optax._optimizers.ldadam import LDAdamState as LDAdamState
from galore_optax._optimizers.ldadam import ldadam as ldadam
from galore_optax._optimizers.muon import galore_muon as galore_muon
from galore_optax._placing.state import state_shardings as state_shardings
from galore_optax._placing.transformation import sharded as sharded
from galore_optax._projector.coordinates import project_gradients as project_gradients
from galore_optax._projector.coordinates import update_projected as update_projected
from galore_optax._projector.refresh import Refresh as Refresh
from galore_optax._selection.dimensions import match_paths as match_paths
from galore_optax._selection.rule import Leaf as Leaf
from galore_optax._state import GaLoreState as GaLoreState
from galore_optax._storage.quantized import quantized as quantized
from galore_optax._wrapping.chain import chain as chain
from galore_optax._wrapping.inject import STATIC_ARGS as STATIC_ARGS
from galore_optax._wrapping.inject import inject_hyperparams as inject_hyperparams
from galore_optax._wrapping.multi_steps import MultiSteps as MultiSteps
from galore_optax._wrapping.multi_steps import (
    ProjectedMultiSteps as ProjectedMultiSteps,
)
from galore_optax.backward import explain as explain
from galore_optax.backward import value_and_projected_grad as value_and_projected_grad
from galore_optax.codes.affine import QuantizedProjector as QuantizedProjector

try:
    __version__ = _version("galore_optax")
except _PackageNotFoundError:  # a source tree on sys.path
    __version__ = "0.0.0+source"
