# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the products of a program, from its jaxpr: 2 m n k each, loops unrolled."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval


def of_products(function: Callable[..., Any], *arguments: Any) -> int:
    """Of what the results of `function` need; arguments may be shapes.

    Raises:
      ValueError: a loop whose turns are not known, or a branch, makes a product.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    needed = [True] * len(closed.jaxpr.outvars)
    used, _ = partial_eval.dce_jaxpr(closed.jaxpr, needed)
    return _of(used)


def _of(jaxpr: Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        return _of_product(equation)
    inside = sum(_of(jaxpr) for jaxpr in _inner(equation.params))
    if inside and name in ("while", "cond"):
        raise ValueError(f"a {name} makes products, how often is not known.")
    return inside * equation.params["length"] if name == "scan" else inside


def _of_product(equation: Any) -> int:
    left, _ = (x.aval.shape for x in equation.invars)
    contracted, _ = equation.params["dimension_numbers"][0]
    entries = math.prod(equation.outvars[0].aval.shape)
    return 2 * entries * math.prod(left[axis] for axis in contracted)


def _inner(parameters: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in jax.tree.leaves(parameters, is_leaf=_is_jaxpr):
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, ClosedJaxpr | Jaxpr)
