# SPDX-License-Identifier: Apache-2.0
"""A loss function, traced once for the parameters that it is differentiated by."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from galore_optax.backward.addend import Factored
from galore_optax.backward.interpreter import Interpreter
from galore_optax.backward.rules import value_of


@dataclasses.dataclass(frozen=True)
class Traced:
    """A loss as a program of the leaves of its parameters."""

    closed: Any  # leaves -> value and leaves of aux
    aux: Any  # their structure

    def run(self, interpreter: Interpreter, leaves: Sequence[Any]) -> Any:
        """Value and aux, for arrays and weights with their addends."""
        jaxpr = self.closed.jaxpr
        value, *aux = interpreter.jaxpr(jaxpr, self.closed.consts, leaves)
        if isinstance(value, Factored):
            value = interpreter.plain(None, value)
        return value, self.aux.unflatten(map(value_of, aux))


def trace(loss: Callable[..., Any], leaves: Sequence[Any], has_aux: bool) -> Traced:
    """`loss`, a function of a list of leaves, as a program."""
    structures: list[Any] = []

    def flat(leaves: Sequence[Any]) -> list[Any]:
        value, aux = loss(leaves) if has_aux else (loss(leaves), None)
        found, structure = jax.tree.flatten(aux)
        structures.append(structure)
        return [value, *found]

    closed = jax.make_jaxpr(flat)(list(leaves))
    return Traced(closed, structures[0])
