# SPDX-License-Identifier: Apache-2.0
"""Memory of accelerators by name, and what a process may have of it."""

import dataclasses
import re
from difflib import get_close_matches

from galore_optax.memory._bytes import parse_size

_MIB, _GIB = 2**20, 2**30

# Bytes that a program can be given, by XLA's descriptions; of others what the driver
# shows as the card's total.
CARDS = {
    "rtx3060": 12_288 * _MIB,
    "t4": 15_360 * _MIB,
    "rtx4060ti-16gb": 16_380 * _MIB,
    "v5e": 16 * _GIB,
    "l4": 23_034 * _MIB,
    "rtx3090": 24_576 * _MIB,
    "rtx4090": 25_353_519_104,
    "rtx5090": 32_607 * _MIB,
    "v6e": 32 * _GIB,
    "a100-40gb": 40_960 * _MIB,
    "a100-80gb": 81_920 * _MIB,
    "h100": 81_559 * _MIB,
    "h200": 150_754_820_096,
}
_TPUS = ("v5e", "v6e")
PREALLOCATED = 0.75  # what JAX takes of a GPU, unless it is told otherwise


@dataclasses.dataclass(frozen=True)
class Budget:
    """What a process may have."""

    name: str
    """Of a card, or a size as it was written."""
    whole: int
    """Bytes of the card, or of the size."""
    share: float
    """Which part of them a process has, at most 1."""

    @property
    def bytes(self) -> int:
        return int(self.share * self.whole)

    @property
    def is_gpu(self) -> bool:
        return self.name in CARDS and self.name not in _TPUS


def budget_of(text: str, share: str | None = None) -> Budget:
    """The budget of a card by its name, or of a size such as `24GB`.

    Args:
      text: the card or the size.
      share: of it, such as `0.9` or `90%`; `None` is JAX's own of a GPU by name, and
        all of a TPU or a size.

    Raises:
      ValueError: one of them is nothing of the kind; the nearest card is offered.
    """
    whole = Budget(text, _memory_of(text), 1.0)
    if share is not None:
        return dataclasses.replace(whole, share=_parse_share(share))
    return dataclasses.replace(whole, share=PREALLOCATED) if whole.is_gpu else whole


def _memory_of(text: str) -> int:
    if text in CARDS:
        return CARDS[text]
    if re.fullmatch(r"\s*[\d.]+\s*", text):
        raise ValueError(
            f"{text!r} has no unit, and would be bytes. Write {text.strip()}GB; a part"
            f" of a card is --budget CARD --share {text.strip()}."
        )
    try:
        return parse_size(text)
    except ValueError as error:
        near = get_close_matches(text, CARDS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{error} {hint}Known cards: {', '.join(CARDS)}.") from None


def _parse_share(text: str) -> float:
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        found = float(number) / (100 if percent else 1)
    except ValueError:
        found = 0.0
    if not 0 < found <= 1:
        raise ValueError(
            f"share={text} must be above 0 and at most 1 or 100%, such as 0.9 or 90%."
        )
    return found
