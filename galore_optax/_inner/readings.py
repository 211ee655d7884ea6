# SPDX-License-Identifier: Apache-2.0
"""What an inner transformation does with params, read once for each structure.

Reading it takes a trace of the inner at full size, as long as the one that a step is
made of. It depends on structures and types alone, so `init` reads, and the updates of
the same transformation find what was read.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import jax

from galore_optax._inner.params_use import Reading


class Known(NamedTuple):
    """Of an inner, on params and a state of one structure."""

    reading: Reading
    state: Any  # shapes at full size


class Readings:
    """Of one transformation."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Known] = {}

    def of(self, structure: Hashable, read: Callable[[], Known]) -> Known:
        """What is known for that structure, or else what `read` finds."""
        if structure in self._known:
            return self._known[structure]
        known = read()
        # What closes over traced hyper-parameters is of this trace alone.
        if not any(isinstance(x, jax.core.Tracer) for x in known.reading.constants):
            self._known[structure] = known
        return known


def types(values: Iterable[Any]) -> tuple[Hashable, ...]:
    """Of arrays, traced or not, or of their shapes; with shardings on explicit axes."""
    return tuple(map(_type, values))


def _type(value: Any) -> Hashable:
    if isinstance(value, jax.ShapeDtypeStruct):
        return value.shape, value.dtype
    return jax.typeof(value)
