# SPDX-License-Identifier: Apache-2.0
"""Memory of accelerators by name."""

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


def memory_of(text: str) -> int:
    """Bytes of a card by its name, or of a size such as `24GB`.

    Raises:
      ValueError: it is neither; the nearest name is offered.
    """
    if text in CARDS:
        return CARDS[text]
    if text.strip().isdigit():
        raise ValueError(
            f"{text!r} has no unit, and would be bytes. Write {text.strip()}GB."
        )
    try:
        return parse_size(text)
    except ValueError as error:
        near = get_close_matches(text, CARDS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{error} {hint}Known cards: {', '.join(CARDS)}.") from None
