# SPDX-License-Identifier: Apache-2.0
"""Whole training steps of a LLaMA in plain JAX: gradients at once, by layer, or never.

    step(params, state, parts) -> (params, state, loss)     parts (A, B, T + 1), int32

of A micro-batches, for programs that are compiled or counted and not run; those that
are timed are of the training program in examples/llama.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from benchmarks.lib.llama import model
from galore_optax import layerwise, memory
from galore_optax.layerwise import Params

FORMED, NEVER = "formed", "never"
Step = Callable[[Params, Any, jax.Array], tuple[Params, Any, jax.Array]]
# (value, gradients or coordinates, state) of one micro-batch, the first of all or not.
Differentiate = Callable[..., tuple[jax.Array, Any, Any]]


def loss_of(sizes: memory.Sizes, remat: bool) -> Callable[[Params, Any], jax.Array]:
    """Embed, a scan over the blocks, head."""
    made = model(sizes)
    block = jax.checkpoint(made.block, prevent_cse=False) if remat else made.block

    def loss(params: Params, batch: Any) -> jax.Array:
        def layer(x: jax.Array, params: Any) -> tuple[jax.Array, None]:
            return block(params, x, batch), None

        x, _ = jax.lax.scan(layer, made.embed(params.embed, batch), params.blocks)
        return made.head(params.head, params.embed, x, batch)

    return loss


def step_of(
    sizes: memory.Sizes,
    tx: optax.GradientTransformation,
    setting: memory.Setting,
    refresh: bool | None = None,
    shares: int = 1,
) -> Step:
    """The step that a setting describes; `refresh` as for `galore`, but by layer."""
    if setting.layerwise:
        return by_layer(sizes, tx, setting).update
    loss = loss_of(sizes, setting.remat)
    return training_step(loss, tx, setting.gradients, refresh, shares)


def by_layer(
    sizes: memory.Sizes, tx: optax.GradientTransformation, setting: memory.Setting
) -> layerwise.Step:
    return layerwise.make_step(model(sizes), tx, remat=setting.remat)


def training_step(
    loss: Callable[..., jax.Array],
    tx: optax.GradientTransformation,
    gradients: str,
    refresh: bool | None = None,
    shares: int = 1,
) -> Step:
    """A step whose gradients are `FORMED` or `NEVER`; `refresh` as for `galore`.

    Without gradients, a refresh is made in `shares`.
    """
    never = functools.partial(_never, shares)
    make = {FORMED: _formed, NEVER: never}[gradients]
    differentiate, update = make(loss, tx, refresh)

    def step(params: Params, state: Any, parts: jax.Array) -> Any:
        value, mean, state = _mean(differentiate, params, state, parts)
        updates, state = update(mean, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def _formed(loss: Any, tx: optax.GradientTransformation, refresh: bool | None) -> Any:
    value_and_grad = jax.value_and_grad(loss)

    def differentiate(params: Any, state: Any, part: Any, first: bool) -> Any:
        return *value_and_grad(params, part), state

    update = optax.with_extra_args_support(tx).update
    return differentiate, functools.partial(update, refresh=refresh)


def _never(
    shares: int, loss: Any, tx: optax.GradientTransformation, refresh: bool | None
) -> Any:
    def differentiate(params: Any, state: Any, part: Any, first: bool) -> Any:
        make = galore_optax.value_and_projected_grad
        when = refresh if first else False
        value_and_grad = make(loss, tx, refresh=when, refresh_shares=shares)
        return value_and_grad(params, state, part)

    return differentiate, functools.partial(galore_optax.update_projected, tx)


def _mean(
    differentiate: Differentiate, params: Params, state: Any, parts: jax.Array
) -> Any:
    """Over micro-batches; the first decides the bases."""
    value, total, state = differentiate(params, state, parts[0], first=True)
    count = len(parts)
    if count == 1:
        return value, total, state

    def add(sums: Any, part: jax.Array) -> tuple[Any, None]:
        found = differentiate(params, state, part, first=False)[:2]
        return jax.tree.map(jnp.add, sums, found), None

    sums, _ = jax.lax.scan(add, (value, total), parts[1:])
    return *jax.tree.map(lambda x: x / count, sums), state


def abstract(
    sizes: memory.Sizes,
    tx: optax.GradientTransformation,
    setting: memory.Setting,
) -> tuple[Params, Any, jax.ShapeDtypeStruct]:
    """The arguments of a step, without numbers."""
    params = memory.shapes(sizes, setting.dtype)
    init = by_layer(sizes, tx, setting).init if setting.layerwise else tx.init
    shape = setting.accumulation, setting.batch, setting.tokens + 1
    return params, jax.eval_shape(init, params), jax.ShapeDtypeStruct(shape, "int32")
