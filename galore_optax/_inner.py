# SPDX-License-Identifier: Apache-2.0
"""What an inner transformation does with `params`, read off its jaxpr.

GaLore runs the inner on the coordinates `Z = PᵀW / scale` of the weights. Three cases
are told apart, by following two marks through the traced update:

- it ignores `params`: nothing more to do;
- its update is affine in `params`, with coefficients that depend on no gradient and no
  moment (decoupled weight decay, masked or scheduled): the part that is linear in the
  weights acts on all of `W`, unscaled, and is added in full space;
- anything else (trust ratios, parameter scales, decay inside the moments): the inner
  sees the coordinates.
"""

import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from galore_optax._flow import called, follow


class ParamsUse(enum.Enum):
    """How an inner transformation depends on `params`."""

    IGNORED = enum.auto()
    ADDITIVE = enum.auto()
    COORDINATES = enum.auto()


class Mark(NamedTuple):
    """What a traced value depends on."""

    weights: int = 0  # 0 not at all, 1 affinely, 2 in any other way
    data: bool = False  # gradients or moments


_CLEAN = Mark()

# Linear in their first operand; further operands, if any, are indices.
_LINEAR = frozenset(
    {
        "neg",
        "copy",
        "copy_p",
        "real",
        "convert_element_type",
        "reduce_precision",
        "reshape",
        "transpose",
        "broadcast_in_dim",
        "squeeze",
        "expand_dims",
        "slice",
        "rev",
        "reduce_sum",
        "sharding_constraint",
        "reshard",
        "device_put",
    }
)
_ADDITIVE = frozenset({"add", "sub", "add_any", "concatenate", "pad"})
_PRODUCTS = frozenset({"mul", "dot_general"})


def depends_on_values(function: Callable[[Any], Any], argument: Any) -> bool:
    """Whether any output of `function` depends on the values in `argument`."""
    jaxpr = jax.make_jaxpr(function)(argument)
    marks = _run(jaxpr, [Mark(weights=2)] * len(jaxpr.in_avals))
    return any(mark.weights for mark in marks)


def params_use(
    update: Callable[[Any, Any, Any], tuple[Any, Any]],
    arguments: tuple[Any, Any, Any],
    is_data: tuple[Any, Any],
    is_weight: Any,
) -> ParamsUse:
    """Classifies `updates, state = update(gradients, state, params)`.

    Args:
      update: of the inner transformation, its extra arguments bound.
      arguments: gradients, state and params, concrete or abstract.
      is_data: bool trees beside gradients and state: what is a gradient or a moment.
      is_weight: a bool tree beside params: which leaves are coordinates.

    Returns:
      how the outputs depend on the weights.
    """
    jaxpr, shapes = jax.make_jaxpr(update, return_shape=True)(*arguments)
    data = jax.tree.leaves(is_data)
    weights = jax.tree.leaves(is_weight)
    marks = [Mark(data=flag) for flag in data] + [Mark(int(flag)) for flag in weights]
    out = _run(jaxpr, marks)
    number_of_updates = len(jax.tree.leaves(shapes[0]))
    of_updates, of_state = out[:number_of_updates], out[number_of_updates:]
    if any(mark.weights for mark in of_state) or any(m.weights > 1 for m in of_updates):
        return ParamsUse.COORDINATES
    if any(mark.weights for mark in of_updates):
        return ParamsUse.ADDITIVE
    return ParamsUse.IGNORED


def _run(closed: core.ClosedJaxpr, marks: Sequence[Mark]) -> list[Mark]:
    return follow(closed, marks, _apply, _CLEAN)


def _apply(equation: Any, inputs: list[Mark]) -> list[Mark]:
    number = len(equation.outvars)
    if not any(mark.weights for mark in inputs):
        return [Mark(data=any(mark.data for mark in inputs))] * number
    name, params = equation.primitive.name, equation.params
    if name == "cond":
        return _apply_cond(params["branches"], inputs)
    jaxpr = called(equation)
    if jaxpr is not None:
        return _run(jaxpr, inputs)
    if name == "optimization_barrier":
        return inputs
    return [_apply_primitive(equation, inputs)] * number


def _apply_cond(branches: Sequence[Any], inputs: list[Mark]) -> list[Mark]:
    predicate, *operands = inputs
    results = [_run(branch, operands) for branch in branches]
    joined = [_join(column) for column in zip(*results, strict=True)]
    return joined if predicate == _CLEAN else [_opaque([predicate, m]) for m in joined]


def _apply_primitive(equation: Any, inputs: list[Mark]) -> Mark:
    name = equation.primitive.name
    first, rest = inputs[0], inputs[1:]
    if name in _ADDITIVE:
        return _join(inputs)
    if name in _LINEAR and _is_floating(equation):
        return first
    if name in _PRODUCTS and _is_coefficient(first):
        return inputs[1]
    if name in (*_PRODUCTS, "div") and all(map(_is_coefficient, rest)):
        return first
    if name == "select_n" and first == _CLEAN:
        return _join(rest)
    return _opaque(inputs)


def _is_floating(equation: Any) -> bool:
    return bool(
        jax.numpy.issubdtype(equation.outvars[0].aval.dtype, jax.numpy.floating)
    )


def _is_coefficient(mark: Mark) -> bool:
    return mark == _CLEAN


def _join(marks: Sequence[Mark]) -> Mark:
    return Mark(max(mark.weights for mark in marks), any(mark.data for mark in marks))


def _opaque(marks: Sequence[Mark]) -> Mark:
    joined = _join(marks)
    return Mark(2 if joined.weights else 0, joined.data)
