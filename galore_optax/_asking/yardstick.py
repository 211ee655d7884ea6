# SPDX-License-Identifier: Apache-2.0
"""Bytes of the state of Optax's Adam, with which a state is compared.

`optax.adam` and `optax.adamw` hold two moments of every leaf in its dtype, and a
counter. By formula: tracing their `init` takes seconds where leaves are in thousands.
"""

import math
from typing import Any

import jax.numpy as jnp

from galore_optax._selection.leaves import flatten

_WIDE = 4  # bytes of f32
_COUNTER = 4


def adam_moments(leaf: Any) -> int:
    """2 · size · itemsize."""
    return 2 * math.prod(leaf.shape) * int(leaf.dtype.itemsize)


def adam_moments_in_f32(leaf: Any) -> int:
    """The same with f32 moments where the leaf has 16 bits."""
    if not is_narrow(leaf.dtype):
        return adam_moments(leaf)
    return 2 * math.prod(leaf.shape) * _WIDE


def adam_state(params: Any) -> tuple[int, int]:
    """Of the whole state: as Optax makes it, and with f32 moments of 16-bit leaves."""
    leaves = flatten(params).values
    sums = (sum(map(size, leaves)) for size in (adam_moments, adam_moments_in_f32))
    narrow, wide = (total + _COUNTER for total in sums)
    return narrow, wide


def is_narrow(dtype: Any) -> bool:
    """Whether it is a floating dtype of 16 bits or fewer."""
    return bool(jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < _WIDE)
