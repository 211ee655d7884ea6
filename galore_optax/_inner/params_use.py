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

from galore_optax._inner.decay import Factors, multiples

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
    """What is linear in one weight: a number times it, an array, or nothing."""

    factor: Any | None
    array: Any | None


class Reading(NamedTuple):
    """How params are used; where that is additive, the part linear in the weights."""

    use: ParamsUse
    decay: Callable[[Arguments], list[Decay]] | None = None
    constants: Sequence[Any] = ()  # that `decay` closes over


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
    own = set(arguments.weights)
    others = [i for i in range(traced.outputs) if i not in own]
    start = len(arguments.gradients) + len(arguments.state)
    weights = [start + position for position in arguments.weights]
    if traced.depends(others, weights):
        return Reading(ParamsUse.COORDINATES)
    if not traced.depends(arguments.weights, weights):
        return Reading(ParamsUse.IGNORED)
    head, tail = traced.split(weights, arguments.weights)
    try:
        linear = _Linear(tail, len(weights))
    except (TypeError, NotImplementedError) as error:
        return _aloud(str(error).splitlines()[0])
    return _read_linear(head, linear, arguments)


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

    def depends(self, outputs: Sequence[int], inputs: Sequence[int]) -> bool:
        """Whether some of these outputs depend on some of these inputs."""
        moving, _ = self._moving(inputs)
        results = _variables(self.closed.jaxpr.outvars[i] for i in outputs)
        if moving.isdisjoint(results):  # most often, and found in a fraction of a time
            return False
        used = self.used_by(outputs)
        return any(used[position] for position in inputs)

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
        moving, equations = self._moving(inputs)
        between = dict.fromkeys(
            x for each in equations for x in _variables(each.invars) if x not in moving
        )
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

    def _moving(self, inputs: Sequence[int]) -> tuple[set[Any], list[Any]]:
        """Variables and equations behind some inputs; all that a call returns."""
        moving = {self.closed.jaxpr.invars[position] for position in inputs}
        equations = []
        for equation in self.closed.jaxpr.eqns:
            if not moving.isdisjoint(_variables(equation.invars)):
                equations.append(equation)
                moving.update(equation.outvars)
        return moving, equations

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


def _read_linear(head: _Traced, linear: "_Linear", arguments: Arguments) -> Reading:
    gradients, state, _ = _split(arguments, head.used_by(linear.needed))
    varies = linear.bends or any(gradients) or _uses_moments(arguments, state)
    if varies or linear.is_zero:
        return Reading(ParamsUse.COORDINATES)
    if linear.derivative is not None and linear.derivative.needs("custom_lin"):
        return _aloud("a function with a reverse-mode rule of its own")

    def decay(values: Arguments) -> list[Decay]:
        between = head.run(linear.needed, _inputs(values))
        return linear.decay(between, values.of_weights)

    return Reading(ParamsUse.ADDITIVE, decay, head.closed.consts + linear.constants)


class _Linear:
    """The part of a program that is linear in the weights.

    Args:
      tail: from (weights, values in between) to one output a weight.
      weights: how many there are.
    """

    def __init__(self, tail: _Traced, weights: int) -> None:
        self.multiples = multiples(tail.closed.jaxpr, weights)
        self.rest = [i for i, found in enumerate(self.multiples) if found is None]
        self.between = tail.closed.jaxpr.invars[weights:]
        # Only where something is no multiple: tracing it takes as long as the program.
        self.derivative = _derivative(tail, weights) if self.rest else None
        uses = [False] * (len(tail.inputs) + weights)
        if self.derivative is not None:
            uses = self.derivative.used_by(self.rest)
        found = [multiple for multiple in self.multiples if multiple is not None]
        read = {variable for multiple in found for variable in multiple.variables}
        pairs = zip(self.between, uses[weights:-weights], strict=True)
        # Positions in between.
        self.needed = [i for i, (x, used) in enumerate(pairs) if used or x in read]
        self.bends = any(uses[:weights])  # it depends on the weights itself
        self.is_zero = not any((*uses[-weights:], *(x.moves for x in found)))

    @property
    def constants(self) -> Arrays:
        return [] if self.derivative is None else list(self.derivative.closed.consts)

    def decay(self, between: Arrays, weights: Arrays) -> list[Decay]:
        """Of these weights, from those values in between that are needed."""
        places = [self.between[position] for position in self.needed]
        known = dict(zip(places, between, strict=True))
        arrays, factor = self._arrays(known, weights), Factors(known)
        return [
            Decay(None if multiple is None else factor(multiple, weight), arrays.get(i))
            for i, (multiple, weight) in enumerate(
                zip(self.multiples, weights, strict=True)
            )
        ]

    def _arrays(self, known: dict[Any, Any], weights: Arrays) -> dict[int, Any]:
        if self.derivative is None:
            return {}
        given = [*weights, *map(known.get, self.between), *weights]
        return dict(zip(self.rest, self.derivative.run(self.rest, given), strict=True))


def _uses_moments(arguments: Arguments, used: Sequence[bool]) -> bool:
    arrays = (x.ndim > 0 for x in _where(used, arguments.state))
    return any(arrays) and any(_where(arguments.is_moment(), used))


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
