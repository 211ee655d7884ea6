# SPDX-License-Identifier: Apache-2.0
"""What a rule for an operation on weights is given, and what it returns."""

import contextlib
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import jax

from galore_optax.backward.addend import Addend, Factored
from galore_optax.backward.listen import Product


class Run(Protocol):
    """The interpreter, as a rule sees it."""

    def jaxpr(self, jaxpr: Any, consts: Any, values: Any) -> list[Any]: ...

    def bind(self, equation: Any, operands: list[Any]) -> list[Any]: ...

    def plain(self, equation: Any, value: Any) -> Any: ...

    def compiled(self, closed: Any, name: str) -> Callable[[Any], list[Any]]: ...

    def product(self, addend: Addend, product: Product) -> jax.Array: ...

    def repeated(self, times: int) -> contextlib.AbstractContextManager[None]: ...


# (interpreter, equation, operands) -> results; `None` where the rule does not apply,
# so that the gradients of the weights among the operands are formed.
Rule: TypeAlias = Callable[[Run, Any, list[Any]], list[Any] | None]


def value_of(operand: Any) -> Any:
    """As an array without a gradient where it is a weight."""
    return operand.weight if isinstance(operand, Factored) else operand
