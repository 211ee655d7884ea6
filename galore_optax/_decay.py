# SPDX-License-Identifier: Apache-2.0
"""Decay that is one number times the weights, so that it fits into the product.

Compilers fuse `P U + W` into one product if `W` stands in it as it lies in memory. A
decay `b W` that is computed beside the product breaks it off: an array of the leaf's
size is written and read again (benchmarks/compiled_step.py counts them).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

# Times a weight it is nothing in 16 bits, and what is divided by it is in range.
_LEAST = 1e-30


class _Multiple(NamedTuple):
    """A factor times one of the directions."""

    direction: Any  # the variable
    factor: Any


def factors(
    jaxpr: Any, inputs: Sequence[Any], directions: int
) -> list[jax.Array | None]:
    """What a linear program multiplies each direction by, where that is one number.

    Args:
      jaxpr: its last inputs are the directions, one for each output.
      inputs: all others; what no output needs may be anything.
      directions: how many there are.

    Returns:
      an f32 scalar for each output, `None` where it is no multiple of its direction.
    """
    variables = jaxpr.invars[-directions:]
    known = dict(zip(jaxpr.invars, inputs, strict=False))
    for variable in variables:
        known[variable] = _Multiple(variable, jnp.float32(1))
    for equation in jaxpr.eqns:
        operands = [_read(known, atom) for atom in equation.invars]
        known[equation.outvars[0]] = _apply(equation.primitive.name, operands)
    found = [_read(known, atom) for atom in jaxpr.outvars]
    return [
        x.factor if isinstance(x, _Multiple) and x.direction is variable else None
        for x, variable in zip(found, variables, strict=True)
    ]


def _read(known: dict[Any, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, core.Literal) else known.get(atom)


def _apply(name: str, operands: Sequence[Any]) -> _Multiple | None:
    multiples = [x for x in operands if isinstance(x, _Multiple)]
    others = [x for x in operands if not isinstance(x, _Multiple)]
    if len(multiples) != 1:
        return None
    (multiple,) = multiples
    if name in ("convert_element_type", "copy") and not others:
        return multiple
    if name == "neg":
        return multiple._replace(factor=-multiple.factor)
    if name == "mul" and all(x is not None and jnp.ndim(x) == 0 for x in others):
        factor = multiple.factor * jnp.asarray(others[0], jnp.float32)
        return multiple._replace(factor=factor)
    return None


def away_from_zero(factor: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`factor` in `dtype`, or a number as good as zero that can be divided by."""
    return jnp.where(jnp.abs(factor) < _LEAST, -_LEAST, factor).astype(dtype)
