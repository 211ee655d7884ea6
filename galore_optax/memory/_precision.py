# SPDX-License-Identifier: Apache-2.0
"""An optimizer whose moments are of another dtype than the weights."""

from typing import Any

import jax
import optax


def in_dtype(
    tx: optax.GradientTransformation, dtype: Any
) -> optax.GradientTransformationExtraArgs:
    """`tx` computed in `dtype`, its updates rounded to the dtype of the weights.

    This is what `galore(..., moment_dtype=dtype)` makes of a leaf at full size.

    Args:
      tx: any transformation.
      dtype: of gradients, weights and so of the state, as `tx` sees them.

    Returns:
      the transformation; to be called with params.
    """
    inner = optax.with_extra_args_support(tx)

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    def init(params: Any) -> Any:
        return inner.init(cast(params))

    def update(updates: Any, state: Any, params: Any, **extra_args: Any) -> Any:
        updates, state = inner.update(cast(updates), state, cast(params), **extra_args)
        rounded = jax.tree.map(lambda x, like: x.astype(like.dtype), updates, params)
        return rounded, state

    return optax.GradientTransformationExtraArgs(init, update)
