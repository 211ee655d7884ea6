# SPDX-License-Identifier: Apache-2.0
"""The training step that is compiled: the plain one, and the layerwise one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import layerwise
from galore_optax.layerwise import Model, Params

Init = Callable[[Params], Any]
Update = Callable[[Params, Any, Any], Any]


def loss_of(model: Model, remat: bool) -> Callable[[Params, Any], jax.Array]:
    """The loss of a batch: embed, a scan over the blocks, head."""
    block = jax.checkpoint(model.block, prevent_cse=False) if remat else model.block

    def loss(params: Params, batch: Any) -> jax.Array:
        def layer(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return block(params, x, batch), None

        x, _ = jax.lax.scan(layer, model.embed(params.embed, batch), params.blocks)
        return model.head(params.head, params.embed, x, batch)

    return loss


def plain_step(
    model: Model, tx: optax.GradientTransformation, remat: bool
) -> tuple[Init, Update]:
    """`init` and `step` that hold all gradients at once.

    With more than one part their gradients are added up in their own dtype.

    Args:
      model: embed, block and head.
      tx: the optimizer.
      remat: whether blocks compute their activations again in the backward pass.

    Returns:
      `init(params) -> state` and `step(params, state, parts) -> (params, state, loss)`,
      to be jitted with the first two donated; every leaf of `parts` has a leading axis
      of micro-batches.
    """
    value_and_grad = jax.value_and_grad(loss_of(model, remat))

    def step(params: Params, state: Any, parts: Any) -> tuple[Params, Any, jax.Array]:
        loss, grads = _mean(value_and_grad, params, parts)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return tx.init, step


def _mean(
    value_and_grad: Callable[[Params, Any], Any], params: Params, parts: Any
) -> Any:
    """Loss and gradients, averaged over the parts."""
    count = jax.tree.leaves(parts)[0].shape[0]
    if count == 1:
        return value_and_grad(params, jax.tree.map(lambda x: x[0], parts))

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, value_and_grad(params, part)), None

    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / count, total)


def layerwise_step(
    model: Model, tx: optax.GradientTransformation, remat: bool
) -> tuple[Init, Update]:
    """`init` and `step` of `galore_optax.layerwise`, as `plain_step` returns them."""
    step = layerwise.make_step(model, tx, remat=remat)
    return step.init, step.update
