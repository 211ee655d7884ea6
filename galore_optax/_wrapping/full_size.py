# SPDX-License-Identifier: Apache-2.0
"""Another learning rate for what is not projected.

Optax multiplies all of an update by the learning rate, decoupled decay included, and a
rate of one's own has to do the same: what is multiplied is the update as it is applied.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax._config import Config
from galore_optax._selection.matrices import Plan


def with_full_size_rate(
    tx: optax.GradientTransformationExtraArgs, config: Config
) -> optax.GradientTransformationExtraArgs:
    """`tx`, whose updates of leaves at full size are multiplied by their rate."""
    rate = config.full_size_rate
    if rate is None:
        return tx

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        updates, state = tx.update(updates, state, params, **extra_args)
        return _scaled(config.selection.plan(updates), rate), state

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _scaled(plan: Plan, rate: Any) -> Any:
    values = [
        value if matrix else _times(rate, value)
        for matrix, value in zip(plan.matrices, plan.flat.values, strict=True)
    ]
    return plan.flat.rebuild(values, [True] * len(values))


def _times(rate: Any, update: jax.Array) -> jax.Array:
    if not jnp.issubdtype(update.dtype, jnp.floating):
        return update
    wide = jnp.promote_types(update.dtype, jnp.float32)
    return (jnp.asarray(rate, wide) * update.astype(wide)).astype(update.dtype)
