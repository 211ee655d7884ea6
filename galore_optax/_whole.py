# SPDX-License-Identifier: Apache-2.0
"""The whole that a tree is a part of.

`galore_optax.layerwise` runs a transformation on one layer at a time. Which leaves are
projected, the random key of each matrix and its turn in a staggered gap are decided
from the whole tree all the same, so that both ways give the same numbers.
"""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any, NamedTuple


class Whole(NamedTuple):
    """All that is trained, and which part of it is at hand."""

    params: Any  # shapes; the leaves of repeated layers have a leading layer axis
    layer: Any  # int32 scalar: whose leaves come without that axis


_WHOLE: contextvars.ContextVar[Whole | None] = contextvars.ContextVar(
    "galore_optax_whole", default=None
)


@contextlib.contextmanager
def part_of(params: Any, layer: Any) -> Iterator[None]:
    """Trees planned inside are parts of `params`."""
    token = _WHOLE.set(Whole(params, layer))
    try:
        yield
    finally:
        _WHOLE.reset(token)


def current() -> Whole | None:
    """The whole, or `None` where the tree at hand is all there is."""
    return _WHOLE.get()
