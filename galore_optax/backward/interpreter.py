# SPDX-License-Identifier: Apache-2.0
"""Runs a traced program on arrays and on weights with their addends.

An operation on arrays is the program's own. One on a weight has a rule that takes the
addend along or makes it listen to a product; where none applies, the weight becomes an
array whose gradient is formed, so that any program gives the right result.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
from jax.extend import core

from galore_optax.backward import control, dot, linear, lookup, ragged
from galore_optax.backward.addend import Addend, Factored
from galore_optax.backward.listen import Product, dense
from galore_optax.backward.rules import Rule

RULES: dict[str, Rule] = {
    **linear.RULES,
    **dot.RULES,
    **ragged.RULES,
    **lookup.RULES,
    **control.RULES,
}


_DEBUG_INFO = core.DebugInfo("galore_optax", "bind", None, None)


class Observer(Protocol):
    """Who is told what becomes of weights, each time a program is traced."""

    def product(self, leaf: str, before: int, after: int) -> None: ...

    def formed(self, equation: Any, leaf: str) -> None: ...

    def repeated(self, times: int) -> contextlib.AbstractContextManager[None]: ...


class Interpreter:
    """Rules applied to a program, equation by equation."""

    def __init__(self, observer: Observer | None = None):
        self._observer = observer
        self._compiled: dict[int, tuple[Any, Any]] = {}

    def jaxpr(
        self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]
    ) -> list[Any]:
        """The results of `jaxpr` for arrays and weights."""
        known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        known.update(zip(jaxpr.invars, values, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else known[atom]

        uses = _last_uses(jaxpr)
        for equation, unused in zip(jaxpr.eqns, uses, strict=True):
            results = self._equation(equation, list(map(read, equation.invars)))
            known.update(zip(equation.outvars, results, strict=True))
            for variable in unused:
                del known[variable]
        return list(map(read, jaxpr.outvars))

    def _equation(self, equation: Any, operands: list[Any]) -> list[Any]:
        if not any(isinstance(x, Factored) for x in operands):
            return self.bind(equation, operands)
        rule = RULES.get(equation.primitive.name)
        results = rule(self, equation, operands) if rule else None
        if results is not None:
            return results
        return self.bind(equation, [self.plain(equation, x) for x in operands])

    def bind(self, equation: Any, operands: list[Any]) -> list[Any]:
        """The results of the program's own operation on arrays."""
        inputs = [x for x in equation.invars if not isinstance(x, core.Literal)]
        pairs = zip(equation.invars, operands, strict=True)
        values = [y for x, y in pairs if not isinstance(x, core.Literal)]
        # JAX binds what is in a jaxpr with its derivatives, names and context.
        parts = inputs, equation.outvars, [equation], equation.effects
        alone = core.Jaxpr((), *parts, debug_info=_DEBUG_INFO)
        return jax.core.eval_jaxpr(alone, (), *values)

    def plain(self, equation: Any, value: Any) -> Any:
        """An array; of a weight, one whose gradient is formed."""
        if not isinstance(value, Factored):
            return value
        if self._observer is not None:
            self._observer.formed(equation, value.addend.leaf)
        return dense(value)

    def compiled(self, closed: Any, name: str) -> Callable[[list[Any]], list[Any]]:
        """`jax.jit` of an inner program, traced once for equal operands."""

        def inner(operands: list[Any]) -> list[Any]:
            return self.jaxpr(closed.jaxpr, closed.consts, operands)

        inner.__name__ = name
        if self._observer is not None:
            return jax.jit(inner)  # each call is observed
        found = self._compiled.setdefault(id(closed), (closed, jax.jit(inner)))
        return found[1]

    def product(self, addend: Addend, product: Product) -> jax.Array:
        """The result of a product, with coordinates for `addend`."""
        if self._observer is not None:
            self._observer.product(addend.leaf, *product.flops(addend))
        return product.listen(addend)

    @contextlib.contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        """Around a program that runs so many times."""
        if self._observer is None:
            yield
        else:
            with self._observer.repeated(times):
                yield


def _last_uses(jaxpr: Any) -> list[set[Any]]:
    """The variables that no equation after each one needs."""
    needed = {x for x in jaxpr.outvars if not isinstance(x, core.Literal)}
    found: list[set[Any]] = []
    for equation in reversed(jaxpr.eqns):
        used = {x for x in equation.invars if not isinstance(x, core.Literal)}
        found.append(used - needed)
        needed |= used
    return found[::-1]
