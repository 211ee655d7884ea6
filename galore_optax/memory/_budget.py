# SPDX-License-Identifier: Apache-2.0
"""Searches for the settings of a training step that fit a budget.

Every combination of what the caller leaves open is estimated. Kept are those that fit
and give nothing up in vain: no other of the same optimizer fits with their rank or a
higher one and fewer compromises.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from galore_optax.memory._estimate import Plan, estimate, measure
from galore_optax.memory._methods import Method
from galore_optax.memory._setting import Setting
from galore_optax.memory._sizes import Sizes
from galore_optax.memory._table import gigabytes, ruled
from galore_optax.memory._workspace import Measured

_FULL = 10**9  # rank of a method without projection
_SMALLEST_RANK = 32
_SHORTEST = 128  # tokens
_MATRIX = jax.ShapeDtypeStruct((2**16, 2**16), jnp.float32)  # above any rank


@dataclasses.dataclass(frozen=True)
class Space:
    """What a search may change.

    Args:
      ranks: to be tried with GaLore, or `None` for width/2, width/4, ... down to 32.
      eight_bit: whether moments may be stored in eight bits.
      remat: values to try.
      layerwise: values to try.
      shrink: whether micro-batches may become smaller, with as many more of them, and
        then sequences shorter.
    """

    ranks: tuple[int, ...] | None = None
    eight_bit: bool = True
    remat: tuple[bool, ...] = (False, True)
    layerwise: tuple[bool, ...] = (False, True)
    shrink: bool = True


@dataclasses.dataclass(frozen=True)
class Choice:
    """A method and a setting that fit, and what they give up."""

    method: Method
    rank: int | None  # None without projection
    plan: Plan
    compromises: tuple[str, ...]

    @property
    def order(self) -> tuple[int, int, int]:
        """Best first: highest rank, fewest compromises, fewest bytes."""
        return (-(self.rank or _FULL), len(self.compromises), self.plan.total)

    def beats(self, other: "Choice") -> bool:
        """Whether it comes first, with only some of the other's compromises."""
        fewer = Counter(self.compromises) <= Counter(other.compromises)
        same = self.method.family == other.method.family
        return same and fewer and self.order < other.order


class NothingFits(ValueError):
    """No setting of the search fits the budget; the message names the smallest."""


def search(
    sizes: Sizes,
    methods: Sequence[Method],
    setting: Setting,
    budget: int,
    space: Space = Space(),
) -> list[Choice]:
    """The settings that fit a budget, best first.

    Best is the highest rank, then the fewest compromises among 8-bit moments, remat,
    layerwise updates, smaller micro-batches and shorter sequences, then fewest bytes.
    Of each optimizer only minimal sets of compromises are shown.

    Args:
      sizes: of the model.
      methods: to try, at every rank of `space` unless one is among their options.
      setting: the starting point.
      budget: bytes.
      space: what may change.

    Returns:
      at least one `Choice`.

    Raises:
      NothingFits: with the smallest that was tried, and by how much it misses.

    Example:
      >>> from galore_optax import memory
      >>> found = memory.search(
      ...     memory.Sizes.load("7b"),
      ...     [memory.Method("galore_adamw")],
      ...     memory.Setting(tokens=256),
      ...     memory.parse_size("24GB"),
      ... )
      >>> found[0].rank, found[0].compromises
      (1024, ('8 bit', 'layerwise'))
    """
    found = list(_candidates(sizes, methods, setting, space))
    fitting = [choice for choice in found if choice.plan.total <= budget]
    if not fitting:
        raise NothingFits(_nothing_fits(found, budget))
    kept = [c for c in fitting if not any(other.beats(c) for other in fitting)]
    return sorted(kept, key=lambda choice: choice.order)


def _candidates(
    sizes: Sizes, methods: Sequence[Method], setting: Setting, space: Space
) -> Iterator[Choice]:
    variants = dict.fromkeys(_variants(sizes, methods, space))
    for method, layerwise in itertools.product(variants, space.layerwise):
        base = dataclasses.replace(setting, layerwise=layerwise)
        try:
            measured = measure(sizes, method.make(), base)
        except ValueError:
            if not layerwise:
                raise
            continue  # it needs all gradients at once
        for one, shrunk in _settings(base, space):
            yield _choice(sizes, method, measured, one, shrunk)


def _choice(
    sizes: Sizes,
    method: Method,
    measured: Measured,
    setting: Setting,
    shrunk: tuple[str, ...],
) -> Choice:
    rank = dict(method.options).get("rank", 128) if method.is_galore else None
    coded = ("8 bit",) if method.is_8bit else ()
    plan = estimate(sizes, measured, setting, str(method))
    return Choice(method, rank, plan, (*coded, *setting.compromises, *shrunk))


def _variants(
    sizes: Sizes, methods: Sequence[Method], space: Space
) -> Iterator[Method]:
    ranks = space.ranks or _ranks(sizes)
    for method in methods:
        chosen = not method.is_galore or "rank" in dict(method.options)
        of_ranks = [method] if chosen else [method.with_options(rank=r) for r in ranks]
        yield from of_ranks
        if space.eight_bit and _has_8bit(method):
            yield from (variant.in_8bit() for variant in of_ranks)


def _has_8bit(method: Method) -> bool:
    """Whether the method has moments of full size that may be stored in eight bits."""
    if method.is_8bit:
        return False
    coded = method.in_8bit()
    try:
        jax.eval_shape(coded.make().init, {"kernel": _MATRIX})
    except ValueError:  # nothing to code, or an option of the method alone
        return False
    return True


def _ranks(sizes: Sizes) -> tuple[int, ...]:
    """width/2, width/4, ... of at least 32."""
    halves = itertools.takewhile(
        lambda rank: rank >= _SMALLEST_RANK,
        (sizes.width >> power for power in range(1, 32)),
    )
    return tuple(halves) or (max(sizes.width // 2, 1),)


def _settings(
    setting: Setting, space: Space
) -> Iterator[tuple[Setting, tuple[str, ...]]]:
    for remat in space.remat:
        base = dataclasses.replace(setting, remat=remat)
        yield base, ()
        if space.shrink:
            yield from _shrunk(base)


def _shrunk(setting: Setting) -> Iterator[tuple[Setting, tuple[str, ...]]]:
    """Half the micro-batch and twice as many of them, then half the sequence, ..."""
    smaller: tuple[str, ...] = ()
    while setting.batch > 1 or setting.tokens >= 2 * _SHORTEST:
        if setting.batch > 1:
            batch, parts = setting.batch // 2, setting.accumulation * 2
            setting = dataclasses.replace(setting, batch=batch, accumulation=parts)
            smaller = (*smaller, "half the micro-batch")
        else:
            setting = dataclasses.replace(setting, tokens=setting.tokens // 2)
            smaller = (*smaller, "half the tokens")
        yield setting, smaller


def _nothing_fits(found: Sequence[Choice], budget: int) -> str:
    least = min(found, key=lambda choice: choice.plan.total)
    total, name = least.plan.total, f"{least.method} with {least.plan.setting}"
    return (
        f"nothing fits {gigabytes(budget)}. The smallest of {len(found)} settings is"
        f" {name}: {gigabytes(total)}, which misses by {gigabytes(total - budget)}."
        " Give a larger budget, fewer tokens or a smaller model."
    )


def choices_table(choices: Sequence[Choice]) -> str:
    """Choices as text, a line each."""
    rows = [["", "rank", "total", "compromises", "setting"]]
    rows += [_row(choice) for choice in choices]
    return ruled(rows, after=(0,))


def _row(choice: Choice) -> list[str]:
    name, rank = choice.method.name, str(choice.rank or "full")
    total, given_up = gigabytes(choice.plan.total), _counted(choice.compromises)
    setting = choice.plan.setting
    micro = f"{setting.accumulation} x " if setting.accumulation > 1 else ""
    return [name, rank, total, given_up, f"{micro}{setting.batch} x {setting.tokens}"]


def _counted(compromises: Sequence[str]) -> str:
    counts = {name: compromises.count(name) for name in dict.fromkeys(compromises)}
    texts = [f"{name} ({n} times)" if n > 1 else name for name, n in counts.items()]
    return ", ".join(texts) or "none"
