# SPDX-License-Identifier: Apache-2.0
"""`value_and_projected_grad`: gradients in coordinates, without the gradients."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_optax._projector.coordinates import project_gradients
from galore_optax._projector.refresh import When
from galore_optax.backward.interpreter import Interpreter
from galore_optax.backward.leaves import (
    Weights,
    bases_of,
    is_due,
    moves_moments,
    weights_of,
    with_bases,
)
from galore_optax.backward.loss import Traced, trace
from galore_optax.backward.renewal import needs_gradients, renew_by_passes


def value_and_projected_grad(
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    argnums: int = 0,
    has_aux: bool = False,
    refresh: When = None,
    refresh_shares: int = 1,
) -> Callable[..., Any]:
    r"""`jax.value_and_grad` in coordinates: no gradient of a projected leaf is formed.

    .. math:: R = P^T G = (x P)^T \, dy \quad\text{for}\quad y = x W

    It is the derivative with respect to `Z` of a loss of `W + P Z` at zero. The loss is
    traced, and each projected leaf followed through what is linear in it (casts,
    transposes, reshapes, slices, `scan`, `remat`, ...) to its products. Where it is
    used in another way its gradient is formed for that use and projected, so that the
    result is right for every loss; `explain` says where.

    A step on which a refresh is due takes two more passes for each iteration of
    `power` or `randomized`, which form no gradient either; one more, which forms all
    gradients, where a method needs them, as `svd` and `eigh` do. Effects of the loss,
    such as callbacks, happen in each pass.

    For several micro-batches, let the loss be the mean of a `lax.scan` over them with
    `jax.checkpoint`: coordinates add up, and bases come from the whole batch.

    Args:
      loss: a function of params and of anything else, with a scalar result.
      tx: the transformation; `galore` anywhere inside it, or nowhere, in which case
        gradients are whole.
      argnums: which positional argument of `loss` is params.
      has_aux: whether `loss` returns a pair of its value and other arrays.
      refresh: as in `update` of `galore`; `False` from the second micro-batch on.
      refresh_shares: bases are found for so many shares of the leaves, one after
        another: as many times the passes, and a share of the memory. With three, and
        256 tokens, LLaMA-7B's refresh needs no more than its step.

    Returns:
      `f(params, state, *args, **kwargs) -> (value, low, state)`, where `args` and
      `kwargs` are what `loss` takes besides params, and `value` is `(value, aux)` with
      `has_aux`. `low` is what `project_gradients` returns, the coordinates of each
      projected leaf and the gradients of the others, all in the dtypes of params, as
      gradients are. `state` has the bases that were used. Give both to
      `update_projected`.

    Raises:
      TypeError: `argnums` or `refresh_shares` is no integer, or, when called, a leaf
        of params is not one of real or complex numbers.
      ValueError: `refresh_shares` is below 1; when called: `state` belongs to another
        tree; what comes before `galore` in `tx` is not linear, such as clipping, and
        would see coordinates; `galore` has a residual, which needs whole gradients.

    Example:
      >>> import galore_optax, jax, jax.numpy as jnp, optax
      >>> tx = galore_optax.galore_adamw(1e-3, rank=4, weight_decay=0.1)
      >>> params = {"w": jnp.ones((16, 32))}
      >>> def loss(params, x):
      ...     return jnp.mean((x @ params["w"]) ** 2)
      >>> @jax.jit
      ... def step(params, state, x):
      ...     value_and_grad = galore_optax.value_and_projected_grad(loss, tx)
      ...     value, low, state = value_and_grad(params, state, x)
      ...     updates, state = galore_optax.update_projected(tx, low, state, params)
      ...     return optax.apply_updates(params, updates), state, low
      >>> params, state, low = step(params, tx.init(params), jnp.ones((8, 16)))
      >>> low["w"].shape
      (4, 32)

    Source: Zhao et al., arXiv 2403.03507, for the projection; CompAct, arXiv
    2410.15352, keeps `x P` in place of `x` for the same product.
    """
    if not isinstance(argnums, int):
        raise TypeError(
            f"value_and_projected_grad(argnums={argnums!r}) must be one integer: the"
            " parameters that the state of tx belongs to are one argument of the loss."
        )
    _check_shares(refresh_shares)

    def run(params: Any, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        def of_params(params: Any, beside: tuple[()]) -> Any:
            del beside
            return loss(*args[:argnums], params, *args[argnums:], **kwargs)

        value, (low, _), state = differentiated(
            of_params,
            tx,
            params,
            (),
            state,
            has_aux=has_aux,
            refresh=refresh,
            shares=refresh_shares,
        )
        return value if has_aux else value[0], low, state

    return run


def differentiated(
    loss: Callable[[Any, Any], Any],
    tx: optax.GradientTransformation,
    params: Any,
    others: Any,
    state: Any,
    *,
    has_aux: bool = False,
    refresh: When = None,
    shares: int = 1,
) -> tuple[Any, tuple[Any, Any], Any]:
    """Value and aux of `loss(params, others)`, its derivatives, and the new state.

    Those by `params` are coordinates, those by `others` whole.
    """
    weights = weights_of(tx, state, params).beside(others)
    program = trace(lambda x: loss(*weights.tree(x)), weights.values, has_aux)
    by_passes = functools.partial(renew_by_passes, shares=shares)
    dense = needs_gradients(weights.records)
    how = functools.partial(_renew_by_gradients, tx) if dense else by_passes
    state = _renewed(how, program, weights, state, refresh)
    return *_steady(program, weights.with_bases(state)), state


def _steady(program: Traced, weights: Weights) -> tuple[Any, tuple[Any, Any]]:
    """Value and aux, and the coordinates of each leaf or its gradient."""

    def of_variables(variables: list[Any]) -> tuple[Any, Any]:
        return program.run(Interpreter(), weights.inputs(variables))

    found = jax.value_and_grad(of_variables, has_aux=True)(weights.variables())
    return found[0], weights.gradients(found[1])


def _check_shares(shares: int) -> None:
    if isinstance(shares, bool) or not isinstance(shares, int):
        raise TypeError(f"refresh_shares={shares!r} must be an integer, such as 1.")
    if shares < 1:
        raise ValueError(f"refresh_shares={shares} must be at least 1.")


def _renewed(
    how: Callable[..., Any], program: Traced, weights: Weights, state: Any, when: When
) -> Any:
    """`state` with new bases for what is due, found by `how`."""
    if when is False or not any(weights.addends):
        return state

    def renew(values: list[Any], bases: list[Any]) -> list[Any]:
        now = dataclasses.replace(weights, values=values)
        return of_state(how(program, now, to_state(state, bases), when))

    def turn(_: Any, bases: list[Any]) -> list[Any]:
        # What depends on weights alone would be computed before the loop, due or not.
        return renew(*lax.optimization_barrier((weights.values, bases)))

    moments = moves_moments(weights.records)
    of_state = functools.partial(bases_of, moments=moments)
    to_state = functools.partial(with_bases, moments=moments)
    bases = of_state(state)
    if when is True:
        return to_state(state, renew(weights.values, bases))
    turns = is_due(weights.records, state, when).astype(jnp.int32)
    return to_state(state, lax.fori_loop(0, turns, turn, bases))


def _renew_by_gradients(
    tx: optax.GradientTransformation,
    program: Traced,
    weights: Weights,
    state: Any,
    when: When,
) -> Any:
    run = functools.partial(program.run, Interpreter())
    gradients, _ = jax.grad(run, has_aux=True)(weights.values)
    params, _ = weights.tree(weights.values)
    tree, _ = weights.tree(gradients)
    return project_gradients(tx, tree, state, params, refresh=when)[1]
