# SPDX-License-Identifier: Apache-2.0
"""Follows values of any kind through a jaxpr."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

from jax.extend import core

Value = TypeVar("Value")
# (equation, values of its operands) -> values of its results
Apply: TypeAlias = Callable[[Any, list[Value]], list[Value]]

_CALLS = (
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
)


def follow(
    closed: core.ClosedJaxpr,
    inputs: Sequence[Value],
    apply: Apply[Value],
    constant: Value,
) -> list[Value]:
    """The values of the outputs, from those of the inputs.

    Args:
      closed: what was traced.
      inputs: a value for each of its arguments.
      apply: the rule for one equation.
      constant: the value of literals and captured constants.

    Returns:
      a value for each output.
    """
    jaxpr = closed.jaxpr
    known: dict[Any, Value] = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
        literal = isinstance(atom, core.Literal)
        return constant if literal else known.get(atom, constant)

    for equation in jaxpr.eqns:
        outputs = apply(equation, [read(atom) for atom in equation.invars])
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def called(equation: Any) -> core.ClosedJaxpr | None:
    """What `equation` calls, if it is a call and nothing else."""
    if equation.primitive.name not in _CALLS:
        return None
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    jaxpr = next(equation.params[x] for x in names if x in equation.params)
    closed = isinstance(jaxpr, core.ClosedJaxpr)
    return jaxpr if closed else core.ClosedJaxpr(jaxpr, ())
