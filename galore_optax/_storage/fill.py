# SPDX-License-Identifier: Apache-2.0
"""Which outputs of a traced function hold one number throughout, and which number.

An optimizer's `init` fills moments with zeros, or with an `initial_accumulator_value`.
Knowing the number, they can be stored in another form without ever being made.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from galore_optax._xla.flow import called

# What leaves every entry as it is, or changes all of them alike.
_UNIFORM = frozenset(
    {
        "broadcast_in_dim",
        "reshape",
        "squeeze",
        "copy",
        "copy_p",
        "convert_element_type",
        "sharding_constraint",
        "reshard",
        "pvary",
    }
)


def fills(
    closed: core.ClosedJaxpr, inputs: Sequence[np.ndarray | None] = ()
) -> list[np.ndarray | None]:
    """The number that fills each output, `None` where there is none or none is known.

    Args:
      closed: what was traced.
      inputs: likewise of its arguments; unknown where left out.

    Returns:
      a zero-dimensional array or `None` for each output.
    """
    jaxpr = closed.jaxpr
    known: dict[Any, np.ndarray | None] = dict(
        zip(jaxpr.constvars, map(_number, closed.consts), strict=True)
    )
    known.update(zip(jaxpr.invars, inputs, strict=False))

    def read(atom: Any) -> np.ndarray | None:
        literal = isinstance(atom, core.Literal)
        return _number(atom.val) if literal else known.get(atom)

    for equation in jaxpr.eqns:
        known.update(_results(equation, [read(atom) for atom in equation.invars]))
    return [read(atom) for atom in jaxpr.outvars]


def _results(
    equation: Any, inputs: list[np.ndarray | None]
) -> dict[Any, np.ndarray | None]:
    inside = called(equation)
    if inside is not None:
        return dict(zip(equation.outvars, fills(inside, inputs), strict=True))
    if equation.primitive.name not in _UNIFORM or inputs[0] is None:
        return {}
    (out,) = equation.outvars
    return {out: inputs[0].astype(out.aval.dtype)}


def _number(value: Any) -> np.ndarray | None:
    if isinstance(value, jax.core.Tracer) or np.ndim(value):
        return None
    is_key = jnp.issubdtype(jnp.result_type(value), jax.dtypes.extended)
    return None if is_key else np.asarray(value)
