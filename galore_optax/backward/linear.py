# SPDX-License-Identifier: Apache-2.0
"""Operations that are linear in a weight, and what becomes of its addend.

The weight itself goes through the program's own operation; the arrays of the addend
are cut as it is, and letters moved.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import lax

from galore_optax._xla.sharding import names_of
from galore_optax.backward.addend import Addend, Change, Factored, Term
from galore_optax.backward.reshape import reshape, with_axis
from galore_optax.backward.rules import Rule, Run

# (equation, addend of its first operand, *other operands) -> an addend for each result,
# or `None` where it cannot follow
Follow: TypeAlias = Callable[..., list[Addend] | None]


def _rule(follow: Follow) -> Rule:
    """The rule of an operation on one weight and arrays."""

    def rule(run: Run, equation: Any, operands: list[Any]) -> list[Any] | None:
        first, *others = operands
        if not isinstance(first, Factored) or _any_weight(others):
            return None
        addends = follow(equation, first.addend, *others)
        if addends is None:
            return None
        weights = run.bind(equation, [first.weight, *others])
        return list(map(Factored, weights, addends))

    return rule


def _any_weight(operands: list[Any]) -> bool:
    return any(isinstance(operand, Factored) for operand in operands)


def _unchanged(equation: Any, addend: Addend) -> list[Addend]:
    del equation
    return [addend]


def _reshard(equation: Any, addend: Addend) -> list[Addend]:
    """Batch axes go where the weight's do: loops and products want them alike."""
    sharding = equation.outvars[0].aval.sharding
    weight = dict(zip(addend.axes, names_of(sharding, len(addend.axes)), strict=True))
    names = {x: y for x, y in weight.items() if all(x in t.axes for t in addend.terms)}
    return [addend.with_terms([x.lying(names) for x in addend.terms], addend.axes)]


def _convert(equation: Any, addend: Addend) -> list[Addend] | None:
    """Coordinates stay as precise as they are, whatever the program computes in."""
    dtype = jnp.dtype(equation.params["new_dtype"])
    is_wide = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
    return [addend] if is_wide else None


def _transpose(equation: Any, addend: Addend) -> list[Addend]:
    return [addend.transposed(equation.params["permutation"])]


def _squeeze(equation: Any, addend: Addend) -> list[Addend]:
    for letter in [addend.axes[axis] for axis in equation.params["dimensions"]]:
        addend = addend.along(letter, jnp.squeeze, "")
    return [addend]


def _reshape(equation: Any, addend: Addend) -> list[Addend] | None:
    if equation.params["dimensions"] is not None:
        return None
    found = reshape(addend, _shape(equation), equation.params["new_sizes"])
    return None if found is None else [found]


def _broadcast(equation: Any, addend: Addend) -> list[Addend]:
    sizes, places = equation.params["shape"], equation.params["broadcast_dimensions"]
    for letter, size, place in zip(addend.axes, _shape(equation), places, strict=True):
        if size != sizes[place]:
            addend = addend.along(letter, _repeat(sizes[place]), letter)
    for place in range(len(sizes)):
        if place not in places:
            addend = with_axis(addend, place, sizes[place])
    return [addend]


def _repeat(size: int) -> Change:
    def change(x: Any, axis: int) -> Any:
        return jnp.broadcast_to(x, (*x.shape[:axis], size, *x.shape[axis + 1 :]))

    return change


def _slice(equation: Any, addend: Addend) -> list[Addend]:
    p, shape = equation.params, _shape(equation)
    steps = p["strides"] or (1,) * len(shape)
    cuts = zip(p["start_indices"], p["limit_indices"], steps, strict=True)
    for letter, size, (start, end, step) in zip(addend.axes, shape, cuts, strict=True):
        if (start, end, step) != (0, size, 1):
            addend = addend.along(letter, _cut(start, end, step), letter)
    return [addend]


def _cut(start: int, end: int, step: int = 1) -> Change:
    return lambda x, axis: lax.slice_in_dim(x, start, end, step, axis)


def _dynamic_slice(equation: Any, addend: Addend, *starts: Any) -> list[Addend]:
    sizes, shape = equation.params["slice_sizes"], _shape(equation)
    cuts = zip(addend.axes, shape, sizes, starts, strict=True)
    for letter, whole, size, start in cuts:
        if size != whole:
            addend = addend.along(letter, _cut_at(start, size), letter)
    return [addend]


def _cut_at(start: Any, size: int) -> Change:
    return lambda x, axis: lax.dynamic_slice_in_dim(x, start, size, axis)


def _split(equation: Any, addend: Addend) -> list[Addend]:
    letter, end, pieces = addend.axes[equation.params["axis"]], 0, []
    for size in map(int, equation.params["sizes"]):
        start, end = end, end + size
        pieces.append(addend.along(letter, _cut(start, end), letter))
    return pieces


def _scaled(scale: Callable[[Any, Any], Any]) -> Follow:
    """By a number; derivatives with respect to that go through the weight."""

    def follow(equation: Any, addend: Addend, number: Any) -> list[Addend] | None:
        del equation
        if jnp.ndim(number):
            return None
        z = addend.variable.array()
        number = lax.stop_gradient(jnp.asarray(number, z.dtype))
        variable = Term(scale(z, number), addend.variable.axes)
        return [addend.with_terms((variable, *addend.bases), addend.axes)]

    return follow


def _either_first(rule: Rule) -> Rule:
    """For an operation that commutes."""

    def either(run: Run, equation: Any, operands: list[Any]) -> list[Any] | None:
        if isinstance(operands[0], Factored):
            return rule(run, equation, operands)
        swapped = equation.replace(invars=equation.invars[::-1])
        return rule(run, swapped, operands[::-1])

    return either


def _barrier(run: Run, equation: Any, operands: list[Any]) -> list[Any]:
    weights = [x.weight if isinstance(x, Factored) else x for x in operands]
    results = run.bind(equation, weights)
    return [
        Factored(result, operand.addend) if isinstance(operand, Factored) else result
        for result, operand in zip(results, operands, strict=True)
    ]


def _stop(run: Run, equation: Any, operands: list[Any]) -> list[Any]:
    (operand,) = operands
    return run.bind(equation, [operand.weight])


def _shape(equation: Any) -> tuple[int, ...]:
    return equation.invars[0].aval.shape


_UNCHANGED = (
    *("copy", "copy_p", "name", "reduce_precision", "pvary", "pcast"),
    *("sharding_constraint", "layout_constraint", "mesh_cast"),
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNCHANGED, _rule(_unchanged)),
    "reshard": _rule(_reshard),
    "convert_element_type": _rule(_convert),
    "transpose": _rule(_transpose),
    "squeeze": _rule(_squeeze),
    "reshape": _rule(_reshape),
    "broadcast_in_dim": _rule(_broadcast),
    "slice": _rule(_slice),
    "dynamic_slice": _rule(_dynamic_slice),
    "split": _rule(_split),
    "mul": _either_first(_rule(_scaled(jnp.multiply))),
    "div": _rule(_scaled(jnp.divide)),
    "optimization_barrier": _barrier,
    "stop_gradient": _stop,
}
