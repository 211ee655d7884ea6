# SPDX-License-Identifier: Apache-2.0
"""Programs inside a program: weights go in with their addends.

`while` and functions with derivatives of their own are not here: a weight that enters
one has its gradient formed, as the program's rules make it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec, Sharding

from galore_optax.backward.addend import Addend, Factored
from galore_optax.backward.params import manual_axes, scan_parts
from galore_optax.backward.rules import Rule, Run


def _jit(run: Run, equation: Any, operands: list[Any]) -> list[Any] | None:
    p = equation.params
    placed = (*p["in_shardings"], *p["out_shardings"])
    if any(isinstance(sharding, Sharding) for sharding in placed):
        return None
    return run.compiled(p["jaxpr"], p["name"])(operands)


def _call(run: Run, equation: Any, operands: list[Any]) -> list[Any]:
    closed = equation.params["call_jaxpr"]
    return run.jaxpr(closed, getattr(closed, "consts", ()), operands)


def _checkpoint(run: Run, equation: Any, operands: list[Any]) -> list[Any]:
    p = equation.params

    def inner(operands: list[Any]) -> list[Any]:
        return run.jaxpr(p["jaxpr"], (), operands)

    remat = jax.checkpoint(inner, policy=p["policy"], prevent_cse=p["prevent_cse"])
    return remat(operands)


def _cond(run: Run, equation: Any, operands: list[Any]) -> list[Any]:
    def branch(closed: Any) -> Any:
        def inner(operands: list[Any]) -> list[Any]:
            results = run.jaxpr(closed.jaxpr, closed.consts, operands)
            return [run.plain(equation, result) for result in results]

        return inner

    index, *given = operands
    branches = list(map(branch, equation.params["branches"]))
    return lax.switch(jnp.asarray(index, jnp.int32), branches, given)


def _scan(run: Run, equation: Any, operands: list[Any]) -> list[Any]:
    p = equation.params
    body = p["jaxpr"].jaxpr
    consts, carry, stacks = scan_parts(equation, operands)
    # A weight that is carried along unchanged is a constant.
    fixed = [
        value if isinstance(value, Factored) and before is after else None
        for value, before, after in zip(
            carry, body.invars[len(consts) :], body.outvars, strict=False
        )
    ]
    carry = [
        None if still else run.plain(equation, value)
        for value, still in zip(carry, fixed, strict=True)
    ]
    stacks = [_led(x) if isinstance(x, Factored) else x for x in stacks]

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        values = [
            *consts,
            *(still or value for value, still in zip(carry, fixed, strict=True)),
            *map(_entry, stacks, slices),
        ]
        with run.repeated(p["length"]):
            results = run.jaxpr(body, p["jaxpr"].consts, values)
        carried = [
            None if still else run.plain(equation, result)
            for result, still in zip(results, fixed, strict=False)
        ]
        return carried, list(map(_decoded, results[len(carry) :]))

    carry, collected = lax.scan(
        step,
        carry,
        list(map(_moving, stacks)),
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    return [
        *(still or value for value, still in zip(carry, fixed, strict=True)),
        *map(_stacked, collected),
    ]


def _led(value: Factored) -> Factored:
    """With the first axis of the weight first in whatever has it."""
    addend = value.addend
    letter = addend.axes[0]
    terms = [x.led_by(letter) if letter in x.axes else x for x in addend.terms]
    return Factored(value.weight, addend.with_terms(terms, addend.axes))


def _moving(stack: Any) -> Any:
    """What a scan takes slices of."""
    if not isinstance(stack, Factored):
        return stack
    letter = stack.addend.axes[0]
    found = [x.stored if letter in x.axes else None for x in stack.addend.terms]
    return stack.weight, found


def _entry(stack: Any, slices: Any) -> Any:
    """`stack` at one step, from slices of what moves."""
    if not isinstance(stack, Factored):
        return slices
    weight, found = slices
    terms = [
        term if stored is None else term.entry(stored)
        for term, stored in zip(stack.addend.terms, found, strict=True)
    ]
    return Factored(weight, stack.addend.with_terms(terms, stack.addend.axes[1:]))


def _stacked(result: Any) -> Any:
    """A result of all steps, whose letters are still those of one."""
    if not isinstance(result, Factored):
        return result
    addend = result.addend
    letter = addend.fresh(1)
    terms = [term.stacked(letter) for term in addend.terms]
    return Factored(result.weight, addend.with_terms(terms, letter + addend.axes))


def _decoded(value: Any) -> Any:
    return value.decoded() if isinstance(value, Factored) else value


def _shard_map(run: Run, equation: Any, operands: list[Any]) -> list[Any]:
    p = equation.params
    operands = list(map(_decoded, operands))

    def inner(operands: list[Any]) -> list[Any]:
        results = run.jaxpr(p["jaxpr"], (), operands)
        return [run.plain(equation, result) for result in results]

    specs = [
        _specs(x.addend, spec) if isinstance(x, Factored) else spec
        for x, spec in zip(operands, p["in_specs"], strict=True)
    ]
    mapped = jax.shard_map(
        inner,
        mesh=p["mesh"],
        in_specs=(specs,),
        out_specs=list(p["out_specs"]),
        axis_names=manual_axes(equation),
        check_vma=p["check_vma"],
    )
    return mapped(operands)


def _specs(addend: Addend, spec: Sequence[Any]) -> Factored:
    """Where the arrays of a weight lie: an axis as the weight's."""
    names = dict(zip(addend.axes, spec, strict=False))
    terms = [
        term.holding(PartitionSpec(*map(names.get, term.axes))) for term in addend.terms
    ]
    return Factored(spec, addend.with_terms(terms, addend.axes))


RULES: dict[str, Rule] = {
    **dict.fromkeys(("jit", "pjit"), _jit),
    **dict.fromkeys(("closed_call", "core_call"), _call),
    **dict.fromkeys(("checkpoint", "remat", "remat2"), _checkpoint),
    "cond": _cond,
    "scan": _scan,
    "shard_map": _shard_map,
}
