# SPDX-License-Identifier: Apache-2.0
"""`dot_general`: coordinates from the two factors of a product."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax.backward.addend import Addend, Factored, Term
from galore_optax.backward.listen import by_letters, listen
from galore_optax.backward.named import Named, product_axes
from galore_optax.backward.rules import Rule, Run, value_of


class Dot(NamedTuple):
    """`y = x W` as the program has it; letters shared with `W` are its axes."""

    y: Named
    x: Named  # the other factor
    contracted: str  # axes of W that are summed over
    precision: Any  # of the program's product

    def listen(self, addend: Addend) -> jax.Array:
        inner, outer = self._sides(addend)
        x = Named(lax.stop_gradient(self.x.array), self.x.axes)
        for basis in inner:
            x = x.times(basis, addend.projected(basis), self.precision)
        names = tuple(map(addend.projected, outer))
        transpose = by_letters(addend, self.y.axes, x.axes, names, self.precision)
        given = x.array, tuple(outer)
        return listen(transpose, self.y.array, given, addend.variable.array())

    def flops(self, addend: Addend) -> tuple[int, int]:
        sizes = dict(zip(self.y.axes, self.y.array.shape, strict=True))
        sizes.update(zip(self.x.axes, self.x.array.shape, strict=True))
        for term in addend.terms:
            sizes.update(zip(term.axes, term.shape, strict=True))

        def product(*factors: str) -> int:
            return 2 * math.prod(sizes[letter] for letter in set("".join(factors)))

        low, total = [self.x.axes, self.y.axes], 0
        for side, bases in enumerate(self._sides(addend)):
            for basis in bases:
                total += product(low[side], basis.axes)
                projected = addend.projected(basis)
                low[side] = product_axes(low[side], basis, projected)
        return product(self.x.axes, self.y.axes), total + product(*low)

    def _sides(self, addend: Addend) -> tuple[list[Term], list[Term]]:
        """Bases that project what is summed over, and the others."""
        inner: list[Term] = []
        outer: list[Term] = []
        for basis in addend.bases:
            projected = set(addend.projected(basis))
            is_inner = projected and projected <= set(self.contracted)
            (inner if is_inner else outer).append(basis)
        return inner, outer


def _dot_general(run: Run, equation: Any, operands: list[Any]) -> list[Any] | None:
    for side, operand in enumerate(operands):
        if isinstance(operand, Factored) and not _can_listen(equation, operand, side):
            return None
    # With two weights, each gets what the other, constant, makes of its addend.
    left, right = map(value_of, operands)
    (y,) = run.bind(equation, [left, right])
    for side, other in enumerate((right, left)):
        if isinstance(operands[side], Factored):
            y = _heard(run, equation, operands[side].addend, y, other, side)
    return [y]


def _can_listen(equation: Any, weight: Factored, side: int) -> bool:
    """Whether each basis has all that it projects in `x` alone, or in `y` alone."""
    axes = weight.addend.axes
    contracted, batch = (
        {axes[axis] for axis in pairs[side]}
        for pairs in equation.params["dimension_numbers"]
    )
    projected = [set(weight.addend.projected(x)) for x in weight.addend.bases]
    return all(
        not x & batch and (x <= contracted or not x & contracted) for x in projected
    )


def _heard(
    run: Run, equation: Any, addend: Addend, y: jax.Array, x: jax.Array, side: int
) -> jax.Array:
    """`y`, with coordinates for the weight on `side`, whose other factor is `x`."""
    contracted, batch = equation.params["dimension_numbers"]
    matched = {
        theirs: addend.axes[ours]
        for pairs in (contracted, batch)
        for ours, theirs in zip(pairs[side], pairs[1 - side], strict=True)
    }
    fresh = iter(addend.fresh(jnp.ndim(x)))
    x_axes = "".join(matched.get(a) or next(fresh) for a in range(jnp.ndim(x)))
    summed = "".join(addend.axes[axis] for axis in contracted[side])
    first = "".join(addend.axes[axis] for axis in batch[side])
    pair = (addend.axes, x_axes) if side == 0 else (x_axes, addend.axes)
    free = (a for axes in pair for a in axes if a not in summed + first)
    names = Named(y, "".join((first, *free))), Named(x, x_axes)
    precision = equation.params["precision"]
    return run.product(addend, Dot(*names, summed, precision))


RULES: dict[str, Rule] = {"dot_general": _dot_general}
