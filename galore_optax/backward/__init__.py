# SPDX-License-Identifier: Apache-2.0
"""Gradients of projected weights in coordinates, and never at full size."""

from galore_optax.backward.explain import explain as explain
from galore_optax.backward.gradient import (
    value_and_projected_grad as value_and_projected_grad,
)
