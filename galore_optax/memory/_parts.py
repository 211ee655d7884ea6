# SPDX-License-Identifier: Apache-2.0
"""A model made of equal layers: its parameters, and its functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Params(NamedTuple):
    """The parameters of a model made of equal layers."""

    embed: Any
    blocks: Any  # every leaf has a leading layer axis
    head: Any


class Model(NamedTuple):
    """A model made of equal layers, as three functions."""

    embed: Callable[[Any, Any], jax.Array]  # (embed, batch) -> x
    block: Callable[[Any, jax.Array, Any], jax.Array]  # (layer, x, batch) -> x
    head: Callable[[Any, Any, jax.Array, Any], jax.Array]  # (head, embed, x, batch)
