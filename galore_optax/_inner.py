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
    is_moment: Sequence[bool]  # of the state
    weights: Sequence[int]  # positions among params, and among gradients and updates

    @property
    def of_weights(self) -> Arrays:
        return [self.params[position] for position in self.weights]

    def with_weights(self, weights: Arrays) -> Arrays:
        params = list(self.params)
        for position, weight in zip(self.weights, weights, strict=True):
            params[position] = weight
        return params


class Reading(NamedTuple):
    """How params are used; where that is additive, the part linear in the weights."""

    use: ParamsUse
    decay: Callable[[Arguments], Arrays] | None = None  # one array a weight


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
    try:
        with_tangents = _trace_tangents(update, arguments)
    except (TypeError, NotImplementedError) as error:
        return _without_derivative(update, arguments, error)
    return _classify(with_tangents, arguments)


class _Traced:
    """A jaxpr, of whose outputs some are asked for."""

    def __init__(self, closed: core.ClosedJaxpr) -> None:
        self.closed = closed
        self.outputs = len(closed.jaxpr.outvars)

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

    def needs(self, outputs: Iterable[int], primitive: str) -> bool:
        """Whether the equations behind these outputs have one of that name."""
        jaxpr, _, _ = self._pruned(outputs)
        return primitive in str(jaxpr)

    def _pruned(self, outputs: Iterable[int]) -> tuple[Any, list[bool], list[bool]]:
        wanted = set(outputs)
        flags = [position in wanted for position in range(self.outputs)]
        return partial_eval.dce_jaxpr_consts(self.closed.jaxpr, flags)


def _where(flags: Sequence[bool], values: Sequence[Any]) -> Arrays:
    return [value for value, flag in zip(values, flags, strict=True) if flag]


def _inputs(arguments: Arguments) -> Arrays:
    return [*arguments.gradients, *arguments.state, *arguments.params]


def _trace_tangents(update: Update, arguments: Arguments) -> _Traced:
    """Of (gradients, state, params, directions), to (updates, state, tangents)."""

    def along(*flat: Any) -> tuple[Arrays, Arrays, Arrays]:
        gradients, state, params, directions = _split(arguments, flat)
        given = arguments._replace(params=params)

        def updates(weights: Arrays) -> tuple[Arrays, tuple[Arrays, Arrays]]:
            found, new = update(gradients, state, given.with_weights(weights))
            return [found[position] for position in given.weights], (found, new)

        _, tangents, (found, new) = jax.jvp(
            updates, (given.of_weights,), (directions,), has_aux=True
        )
        return found, new, tangents

    return _Traced(jax.make_jaxpr(along)(*_inputs(arguments), *arguments.of_weights))


def _split(arguments: Arguments, flat: Sequence[Any]) -> list[Arrays]:
    rest, parts = list(flat), []
    for part in (arguments.gradients, arguments.state, arguments.params):
        parts.append(rest[: len(part)])
        rest = rest[len(part) :]
    return [*parts, rest]


def _classify(traced: _Traced, arguments: Arguments) -> Reading:
    tangents = range(traced.outputs - len(arguments.weights), traced.outputs)
    others = [i for i in range(tangents.start) if i not in arguments.weights]
    if not _uses_weights(traced, range(tangents.start), arguments):
        return Reading(ParamsUse.IGNORED)
    if _uses_weights(traced, others, arguments):
        return Reading(ParamsUse.COORDINATES)
    gradients, state, params, directions = _split(arguments, traced.used_by(tangents))
    moments = [
        s for s, moment in zip(state, arguments.is_moment, strict=True) if moment
    ]
    varies = any((*gradients, *moments, *(params[i] for i in arguments.weights)))
    if varies or not any(directions):
        return Reading(ParamsUse.COORDINATES)
    if traced.needs(tangents, "custom_lin"):
        return _aloud("a function with a reverse-mode rule of its own")

    def decay(values: Arguments) -> Arrays:
        return traced.run(tangents, [*_inputs(values), *values.of_weights])

    return Reading(ParamsUse.ADDITIVE, decay)


def _uses_weights(
    traced: _Traced, outputs: Iterable[int], arguments: Arguments
) -> bool:
    _, _, params, _ = _split(arguments, traced.used_by(outputs))
    return any(params[position] for position in arguments.weights)


def _without_derivative(
    update: Update, arguments: Arguments, error: Exception
) -> Reading:
    def results(*flat: Any) -> tuple[Arrays, Arrays]:
        gradients, state, params, _ = _split(arguments, flat)
        return update(gradients, state, params)

    # Raises by itself where the update, and not its derivative, is at fault.
    traced = _Traced(jax.make_jaxpr(results)(*_inputs(arguments)))
    if not _uses_weights(traced, range(traced.outputs), arguments):
        return Reading(ParamsUse.IGNORED)
    return _aloud(str(error).splitlines()[0])


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
