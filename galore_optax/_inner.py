# SPDX-License-Identifier: Apache-2.0
"""What an inner transformation does with `params`, read off its derivative.

GaLore runs the inner on the coordinates `Z = PᵀW / scale` of the weights. Three cases
are told apart, by what the results of one traced update, and their derivative along the
weights, depend on:

- no result depends on the weights: nothing more to do;
- the derivative of the update depends on no gradient, no moment and no weight, and the
  new state on no weight (decoupled weight decay, masked or scheduled): the update is
  affine in the weights, and its derivative along `W` is the decay of all of `W`, which
  is added in full space, unscaled;
- anything else (trust ratios, parameter scales, decay inside the moments): the inner
  sees the coordinates.
"""

import enum
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
from jax.extend import core
from jax.interpreters import partial_eval

from galore_optax._decay import factors

Arrays: TypeAlias = list[Any]
# (gradients, state, params) -> (updates, state), one list of arrays each
Update: TypeAlias = Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]


class ParamsUse(enum.Enum):
    """How an inner transformation depends on `params`."""

    IGNORED = enum.auto()
    ADDITIVE = enum.auto()
    COORDINATES = enum.auto()


class Arguments(NamedTuple):
    """Of one update at full size, and what is known of them."""

    gradients: Arrays
    state: Arrays
    params: Arrays
    is_moment: Callable[[], Sequence[bool]]  # of the state
    weights: Sequence[int]  # positions among params, and among gradients and updates

    @property
    def of_weights(self) -> Arrays:
        return [self.params[position] for position in self.weights]


class Decay(NamedTuple):
    """What is linear in the weights, for one set of arguments."""

    factors: list[jax.Array | None]  # where it is a number times the weight
    arrays: Arrays  # all of it, one array a weight


class Reading(NamedTuple):
    """How params are used; where that is additive, the part linear in the weights."""

    use: ParamsUse
    decay: Callable[[Arguments], Decay] | None = None


def depends_on_values(function: Callable[[Any], Any], argument: Any) -> bool:
    """Whether any output of `function` depends on the values in `argument`."""
    traced = _Traced(jax.make_jaxpr(function)(argument))
    return any(traced.used_by(range(traced.outputs)))


def is_affine(function: Callable[[Arrays], Arrays], argument: Arrays) -> bool:
    """Whether the derivative of `function` is the same at every argument."""

    def along(argument: Arrays, directions: Arrays) -> Arrays:
        return jax.jvp(function, (argument,), (directions,))[1]

    traced = _Traced(jax.make_jaxpr(along)(argument, argument))
    return not any(traced.used_by(range(traced.outputs))[: len(argument)])


def read_use(update: Update, arguments: Arguments) -> Reading:
    """Classifies `update`, and finds the part of it that is linear in the weights.

    Args:
      update: of the inner transformation, its extra arguments bound.
      arguments: concrete, traced or abstract; only their types are looked at.

    Returns:
      the use of params, and its linear part.
    """
    traced = _trace(update, arguments)
    others = [i for i in range(traced.outputs) if i not in arguments.weights]
    if not _uses_weights(traced, range(traced.outputs), arguments):
        return Reading(ParamsUse.IGNORED)
    if _uses_weights(traced, others, arguments):
        return Reading(ParamsUse.COORDINATES)
    start = len(arguments.gradients) + len(arguments.state)
    weights = [start + position for position in arguments.weights]
    head, tail = traced.split(weights, arguments.weights)
    try:
        return _read_derivative(head, _derivative(tail, len(weights)), arguments)
    except (TypeError, NotImplementedError) as error:
        return _aloud(str(error).splitlines()[0])


class _Traced:
    """A jaxpr, of whose outputs some are asked for."""

    def __init__(self, closed: core.ClosedJaxpr) -> None:
        self.closed = closed
        self.outputs = len(closed.jaxpr.outvars)

    @property
    def inputs(self) -> list[jax.ShapeDtypeStruct]:
        return list(self.closed.in_avals)

    def used_by(self, outputs: Iterable[int]) -> list[bool]:
        """Which inputs some of these outputs depend on."""
        _, _, used = self._pruned(outputs)
        return used

    def run(self, outputs: Iterable[int], inputs: Arrays) -> Arrays:
        """These outputs alone; inputs that they do not depend on may be anything."""
        jaxpr, used_constants, used = self._pruned(outputs)
        constants = _where(used_constants, self.closed.consts)
        function = core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, constants))
        return list(function(*_where(used, inputs)))

    def needs(self, primitive: str) -> bool:
        """Whether an equation behind some output has that name."""
        jaxpr, _, _ = self._pruned(range(self.outputs))
        return primitive in str(jaxpr)

    def split(
        self, inputs: Sequence[int], outputs: Sequence[int]
    ) -> tuple["_Traced", "_Traced"]:
        """All that does not depend on some inputs, and the rest that leads to outputs.

        Returns:
          the program from all inputs to the values in between, and the one from
          `inputs`, followed by those values, to `outputs`.
        """
        jaxpr, constants = self.closed.jaxpr, self.closed.consts
        moving = {jaxpr.invars[position] for position in inputs}
        equations, between = [], dict[Any, None]()
        for equation in jaxpr.eqns:
            read = _variables(equation.invars)
            if not moving.isdisjoint(read):
                equations.append(equation)
                between.update((x, None) for x in read if x not in moving)
                moving.update(equation.outvars)
        results = [jaxpr.outvars[position] for position in outputs]
        between.update((x, None) for x in _variables(results) if x not in moving)
        head = jaxpr.replace(outvars=list(between))
        given = [jaxpr.invars[position] for position in inputs]
        tail = jaxpr.replace(
            constvars=[], invars=[*given, *between], eqns=equations, outvars=results
        )
        return (
            _Traced(core.ClosedJaxpr(head, constants)),
            _Traced(core.ClosedJaxpr(tail, [])),
        )

    def _pruned(self, outputs: Iterable[int]) -> tuple[Any, list[bool], list[bool]]:
        wanted = set(outputs)
        flags = [position in wanted for position in range(self.outputs)]
        return partial_eval.dce_jaxpr_consts(self.closed.jaxpr, flags)


def _where(flags: Sequence[bool], values: Sequence[Any]) -> Arrays:
    return [value for value, flag in zip(values, flags, strict=True) if flag]


def _variables(atoms: Iterable[Any]) -> Arrays:
    return [atom for atom in atoms if not isinstance(atom, core.Literal)]


def _inputs(arguments: Arguments) -> Arrays:
    return [*arguments.gradients, *arguments.state, *arguments.params]


def _split(arguments: Arguments, flat: Sequence[Any]) -> list[Arrays]:
    rest, parts = list(flat), []
    for part in arguments[:3]:
        parts.append(rest[: len(part)])
        rest = rest[len(part) :]
    return parts


def _trace(update: Update, arguments: Arguments) -> _Traced:
    def results(*flat: Any) -> tuple[Arrays, Arrays]:
        return update(*_split(arguments, flat))

    return _Traced(jax.make_jaxpr(results)(*_inputs(arguments)))


def _derivative(tail: _Traced, weights: int) -> _Traced:
    """Of (weights, values in between, directions), to a tangent for each output."""

    def along(*flat: Any) -> Arrays:
        between = list(flat[weights : len(tail.inputs)])

        def outputs(*given: Any) -> Arrays:
            return tail.run(range(tail.outputs), [*given, *between])

        return jax.jvp(outputs, flat[:weights], flat[len(tail.inputs) :])[1]

    return _Traced(jax.make_jaxpr(along)(*tail.inputs, *tail.inputs[:weights]))


def _read_derivative(
    head: _Traced, derivative: _Traced, arguments: Arguments
) -> Reading:
    every, number = range(derivative.outputs), len(arguments.weights)
    used = derivative.used_by(every)
    weights, between, directions = used[:number], used[number:-number], used[-number:]
    needed = [position for position, flag in enumerate(between) if flag]
    gradients, state, _ = _split(arguments, head.used_by(needed))
    varies = any((*weights, *gradients)) or _uses_moments(arguments, state)
    if varies or not any(directions):
        return Reading(ParamsUse.COORDINATES)
    if derivative.needs("custom_lin"):
        return _aloud("a function with a reverse-mode rule of its own")

    def decay(values: Arguments) -> Decay:
        given: Arrays = [None] * len(used)
        found = head.run(needed, _inputs(values))
        for position, value in zip(needed, found, strict=True):
            given[number + position] = value
        given[-number:] = values.of_weights
        multiples = factors(derivative.closed.jaxpr, given[:-number], number)
        return Decay(multiples, derivative.run(every, given))

    return Reading(ParamsUse.ADDITIVE, decay)


def _uses_moments(arguments: Arguments, used: Sequence[bool]) -> bool:
    arrays = (x.ndim > 0 for x in _where(used, arguments.state))
    return any(arrays) and any(_where(arguments.is_moment(), used))


def _uses_weights(
    traced: _Traced, outputs: Iterable[int], arguments: Arguments
) -> bool:
    _, _, params = _split(arguments, traced.used_by(outputs))
    return any(params[position] for position in arguments.weights)


def _aloud(why: str) -> Reading:
    warnings.warn(
        "what the inner optimizer does with params has no forward-mode derivative"
        f" ({why}), so weight decay cannot be told from the rest: the inner sees the"
        " coordinates of the weights, and what lies outside the subspace does not"
        " decay. Put optax.add_decayed_weights around galore instead.",
        UserWarning,
        stacklevel=2,
    )
    return Reading(ParamsUse.COORDINATES)
