# SPDX-License-Identifier: Apache-2.0
"""What reaches a `galore` through whatever transformations are wrapped around it.

Wrappers of Optax hand on trees and extra arguments, and nothing else. Who asks what is
projected, or runs one layer of a whole, says so here for as long as a call lasts.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Whole(NamedTuple):
    """All that is trained, and which part of it is at hand.

    `galore_optax.layerwise` runs a transformation on one layer at a time. Which leaves
    are projected, the random key of each matrix and its turn in a staggered gap are
    decided from the whole tree all the same, so that both ways give the same numbers.
    """

    params: Any  # shapes; the leaves of repeated layers have a leading layer axis
    layer: Any  # int32 scalar: whose leaves come without that axis


class Declared(NamedTuple):
    """Where parameters lie, for `galore_optax.sharded`: a tracer of an Auto mesh
    cannot tell.
    """

    leaves: Mapping[str, Any]  # NamedSharding by path
    spread: tuple[str, ...]  # mesh axes over which the state is split besides

    @property
    def mesh(self) -> Any:
        return next(iter(self.leaves.values())).mesh


@dataclasses.dataclass(frozen=True)
class Context:
    """Of the calls of `init` and `update` inside a `within`."""

    records: list[Any] | None = None  # takes what each init projects
    updates: list[Any] | None = (
        None  # takes what reaches each update, which does no more
    )
    whole: Whole | None = None  # that trees are a part of
    declared: Declared | None = None
    storages: list[Any] | None = None  # takes how each init stores its moments
    # For traces that are looked at and never compiled: of calls, not of their insides.
    # A compiled step has no calls: XLA would hold what goes in and comes out, 1.5 GB of
    # a 7B step on GPU.
    only_read: bool = False


_NOTHING = Context()
_CONTEXT: contextvars.ContextVar[Context] = contextvars.ContextVar(
    "galore_optax", default=_NOTHING
)


def current() -> Context:
    """That of the call at hand."""
    return _CONTEXT.get()


@contextlib.contextmanager
def within(**changes: Any) -> Iterator[None]:
    """The context, changed, until the end of the block."""
    token = _CONTEXT.set(dataclasses.replace(current(), **changes))
    try:
        yield
    finally:
        _CONTEXT.reset(token)
