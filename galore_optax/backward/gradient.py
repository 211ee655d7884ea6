# SPDX-License-Identifier: Apache-2.0
"""`value_and_projected_grad`: gradients in coordinates, without the gradients."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_optax._coordinates import project_gradients
from galore_optax._refresh import When
from galore_optax.backward.interpreter import Interpreter
from galore_optax.backward.leaves import (
    Weights,
    bases_of,
    is_due,
    weights_of,
    with_bases,
)
from galore_optax.backward.loss import Traced, trace


def value_and_projected_grad(
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    argnums: int = 0,
    has_aux: bool = False,
    refresh: When = None,
) -> Callable[..., Any]:
    def run(params: Any, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        def of_leaves(leaves: Sequence[Any]) -> Any:
            tree = weights.tree(leaves)
            return loss(*args[:argnums], tree, *args[argnums:], **kwargs)

        weights = weights_of(tx, state, params)
        program = trace(of_leaves, weights.values, has_aux)
        state = _renewed(program, weights, tx, state, refresh)
        value, low = _steady(program, weights.with_bases(tx, state))
        return value if has_aux else value[0], low, state

    return run


def _steady(program: Traced, weights: Weights) -> tuple[Any, Any]:
    """Value and aux, and the coordinates of each leaf or its gradient."""

    def of_variables(variables: list[Any]) -> tuple[Any, Any]:
        return program.run(Interpreter(), weights.inputs(variables))

    found = jax.value_and_grad(of_variables, has_aux=True)(weights.variables())
    return found[0], weights.gradients(found[1])


def _renewed(
    program: Traced,
    weights: Weights,
    tx: optax.GradientTransformation,
    state: Any,
    when: When,
) -> Any:
    """`state` with new bases for what is due, from gradients made for it."""
    if when is False or not any(weights.addends):
        return state
    params = weights.tree(weights.values)

    def renew(values: list[Any], bases: list[Any]) -> list[Any]:
        run = functools.partial(program.run, Interpreter())
        gradients, _ = jax.grad(run, has_aux=True)(values)
        old = with_bases(state, bases)
        found = project_gradients(
            tx, weights.tree(gradients), old, params, refresh=when
        )
        return bases_of(found[1])

    def turn(_: Any, bases: list[Any]) -> list[Any]:
        # What depends on weights alone would be computed before the loop, due or not.
        return renew(*lax.optimization_barrier((weights.values, bases)))

    bases = bases_of(state)
    if when is True:
        return with_bases(state, renew(weights.values, bases))
    due = is_due(tx, state, params)
    turns = (due if when is None else due & when).astype(jnp.int32)
    return with_bases(state, lax.fori_loop(0, turns, turn, bases))
