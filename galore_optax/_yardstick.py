# SPDX-License-Identifier: Apache-2.0
"""The state of Optax's Adam, with which a state is compared.

`optax.adamw` holds the same: two moments of every leaf in its dtype, and a counter.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

_NARROW = 2  # bytes of a 16-bit float


def adam_state(params: Any) -> Any:
    """Shapes of the state as Optax makes it: moments in the dtypes of `params`."""
    return jax.eval_shape(optax.adam(1.0).init, params)


def adam_state_in_f32(params: Any) -> Any:
    """The same with f32 moments of 16-bit leaves."""
    return jax.eval_shape(
        lambda tree: optax.adam(1.0).init(jax.tree.map(_widened, tree)), params
    )


def is_narrow(dtype: Any) -> bool:
    """Whether it is a floating dtype of 16 bits or fewer."""
    return bool(
        jnp.issubdtype(dtype, jnp.floating) and jnp.dtype(dtype).itemsize <= _NARROW
    )


def _widened(leaf: Any) -> Any:
    return leaf.astype(jnp.float32) if is_narrow(leaf.dtype) else leaf
