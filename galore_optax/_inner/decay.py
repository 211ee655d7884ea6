# SPDX-License-Identifier: Apache-2.0
"""Decay that is one number times the weights, so that it fits into the product.

Compilers fuse `P U + W` into one product if `W` stands in it as it lies in memory. A
decay `b W` that is computed beside the product breaks it off: an array of the leaf's
size is written and read again (`memory/compiled_step` counts them).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

# Times a weight it is nothing in 16 bits, and what is divided by it is in range.
_LEAST = 1e-30


class Multiple(NamedTuple):
    """Some numbers times a weight, plus what does not depend on weights."""

    weight: Any  # the variable, or None for nothing of any weight
    numbers: tuple[Any, ...]  # floats and variables

    @property
    def variables(self) -> list[Any]:
        return [x for x in self.numbers if isinstance(x, core.Var)]

    @property
    def moves(self) -> bool:
        """Whether it depends on a weight."""
        return self.weight is not None


class Factors:
    """What multiples multiply by, each product computed once.

    Args:
      known: the values of variables.
    """

    def __init__(self, known: Mapping[Any, Any]) -> None:
        self._known = known
        self._found: dict[Any, Any] = {}

    def __call__(self, multiple: Multiple, weight: Any) -> Any | None:
        """A scalar, at least f32 and f64 where the weight is; `None` for nothing."""
        if not multiple.moves:
            return None
        dtype = jnp.promote_types(jnp.float32, weight.dtype)
        key = dtype, multiple.numbers
        if key not in self._found:
            self._found[key] = self._product(multiple, dtype)
        return self._found[key]

    def _product(self, multiple: Multiple, dtype: np.dtype) -> Any:
        product = dtype.type(1)
        for number in multiple.numbers:
            if isinstance(number, core.Var):
                product = product * jnp.asarray(self._known[number], dtype)
            else:
                product = product * dtype.type(number)
        return product


_NOTHING = Multiple(None, ())


def multiples(jaxpr: Any, weights: int) -> list[Multiple | None]:
    """What a program adds of its first inputs, the weights, to its outputs.

    Args:
      jaxpr: each of its equations depends on some weight.
      weights: how many there are, one for each output.

    Returns:
      for each output the multiple of its weight, or of nothing; `None` where it is
      anything else.
    """
    own = jaxpr.invars[:weights]
    moving: dict[Any, Multiple | None] = {x: Multiple(x, ()) for x in own}
    for equation in jaxpr.eqns:
        moving.update(dict.fromkeys(equation.outvars, _apply(equation, moving)))
    found = [moving[x] if _moves(x, moving) else _NOTHING for x in jaxpr.outvars]
    return [
        x if x is not None and x.weight in (weight, None) else None
        for weight, x in zip(own, found, strict=True)
    ]


def _moves(atom: Any, moving: Mapping[Any, Any]) -> bool:
    return not isinstance(atom, core.Literal) and atom in moving


def _apply(equation: Any, moving: Mapping[Any, Multiple | None]) -> Multiple | None:
    name, operands = equation.primitive.name, equation.invars
    first, *more = [moving[x] for x in operands if _moves(x, moving)]
    others = [x for x in operands if not _moves(x, moving)]
    real = jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)
    if first is None or more or not real:
        return None
    if name in ("convert_element_type", "copy", "add"):
        return first
    if name == "sub" and _moves(operands[0], moving):
        return first
    if name in ("sub", "neg"):
        return _times(first, -1.0)
    if name == "mul" and others[0].aval.ndim == 0:
        literal = isinstance(others[0], core.Literal)
        return _times(first, float(others[0].val) if literal else others[0])
    return None


def _times(multiple: Multiple, number: Any) -> Multiple:
    return multiple._replace(numbers=(*multiple.numbers, number))


def away_from_zero(factor: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`factor` in `dtype`, or a number as good as zero that can be divided by."""
    return jnp.where(jnp.abs(factor) < _LEAST, -_LEAST, factor).astype(dtype)
