# SPDX-License-Identifier: Apache-2.0
"""Which ranks and settings of a training step fit a budget."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from galore_optax.memory._methods import Method
from galore_optax.memory._model import FORMED, Setting, Sizes
from galore_optax.memory._plan import Plan, estimate, exact
from galore_optax.memory._show import gigabytes

_FULL = 10**9  # rank of a method without projection
_SMALLEST_RANK = 32


class Choice(NamedTuple):
    """A method and a setting that fit."""

    method: Method
    plan: Plan

    @property
    def rank(self) -> int | None:
        """`None` without projection."""
        return dict(self.method.options)["rank"] if self.method.is_galore else None

    @property
    def savings(self) -> tuple[str, ...]:
        """What it does for memory beside a plain step with moments in full."""
        coded = ("8 bit",) if self.method.is_8bit else ()
        return (*coded, *self.plan.setting.savings)

    @property
    def order(self) -> tuple[int, int, int]:
        """Best first: highest rank, fewest savings, fewest bytes."""
        return (-(self.rank or _FULL), len(self.savings), self.plan.total)

    def beats(self, other: "Choice") -> bool:
        """Whether it comes first, with only some of the other's savings."""
        fewer = set(self.savings) <= set(other.savings)
        same = self.method.family == other.method.family
        return same and fewer and self.order < other.order


class NothingFits(ValueError):
    """No setting of the search fits the budget; the message names the smallest."""


def search(
    sizes: Sizes, methods: Sequence[Method], settings: Sequence[Setting], budget: int
) -> list[Choice]:
    """What fits a budget, best first.

    Every method is tried with moments in full and in eight bits, at ranks width/2,
    width/4, ... down to 32 unless one is among its options, and in every setting that
    it can run in. Best is the highest rank, then the fewest savings among 8-bit
    moments, remat, layerwise and gradients never formed, then fewest bytes. Of each
    optimizer only what needs no saving in vain is shown.

    Args:
      sizes: of the model.
      methods: to try.
      settings: to try.
      budget: bytes.

    Returns:
      at least one `Choice`.

    Raises:
      NothingFits: with the smallest that was tried, and by how much it misses.
      ValueError: an unknown method or option; none runs in any of the settings.

    Example:
      >>> from galore_optax import memory
      >>> found = memory.search(
      ...     memory.Sizes.load("7b"),
      ...     [memory.Method("galore_adamw")],
      ...     [memory.Setting(remat=True, layerwise=x) for x in (False, True)],
      ...     memory.parse_size("24GB"),
      ... )
      >>> found[0].rank, found[0].savings
      (1024, ('8 bit', 'remat', 'layerwise'))
    """
    for method in methods:
        method.make()  # raises for what is unknown
    variants = dict.fromkeys(x for y in methods for x in _variants(y, sizes))
    found = [y for x in variants for y in _choices(sizes, x, settings)]
    if not found:
        exact(sizes, methods[0].make(), settings[0])  # raises for what hinders it
    fitting = [choice for choice in found if choice.plan.total <= budget]
    if not fitting:
        least = min((choice.plan for choice in found), key=lambda plan: plan.total)
        raise NothingFits(
            f"nothing fits {gigabytes(budget)}. The smallest of {len(found)} settings"
            f" is {least.name} with {least.setting}: {gigabytes(least.total)}, which"
            f" misses by {gigabytes(least.total - budget)}. Give a larger budget, fewer"
            " tokens, smaller micro-batches or a smaller model."
        )
    kept = [c for c in fitting if not any(other.beats(c) for other in fitting)]
    return sorted(kept, key=lambda choice: choice.order)


def _variants(method: Method, sizes: Sizes) -> Iterator[Method]:
    """At every rank, and in eight bits."""
    halves = [sizes.width >> power for power in range(1, sizes.width.bit_length())]
    ranks = [rank for rank in halves if rank >= _SMALLEST_RANK] or halves[:1]
    fixed = not method.is_galore or "rank" in dict(method.options)
    for variant in [method] if fixed else [method.with_options(rank=x) for x in ranks]:
        yield variant
        if not method.is_8bit:
            yield variant.in_8bit()


def _choices(
    sizes: Sizes, method: Method, settings: Sequence[Setting]
) -> Iterator[Choice]:
    """Of one method, in every setting that it can run in."""
    if not method.is_galore:  # all that it trains has a gradient
        formed = (dataclasses.replace(x, gradients=FORMED) for x in settings)
        settings = list(dict.fromkeys(formed))
    for _, group in itertools.groupby(sorted(settings, key=_exactly), key=_exactly):
        alike = list(group)
        try:
            found = exact(sizes, method.make(), alike[0])
        except ValueError:
            continue  # no moments for eight bits, or all gradients needed at once
        for setting in alike:
            yield Choice(method, estimate(sizes, found, setting, str(method)))


def _exactly(setting: Setting) -> tuple[str, bool]:
    """What the exact part of a plan depends on."""
    return setting.dtype, setting.layerwise
