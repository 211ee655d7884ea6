# SPDX-License-Identifier: Apache-2.0
"""What a training step holds in memory, before there is a device to run it on."""

from galore_optax.memory._configs import config_names as config_names
from galore_optax.memory._configs import config_path as config_path
