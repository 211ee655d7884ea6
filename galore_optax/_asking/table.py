# SPDX-License-Identifier: Apache-2.0
"""Reports of leaves as a table, a line for equal layers."""

from collections.abc import Sequence
from typing import Any

from galore_optax._asking.fold import Line, fold
from galore_optax._asking.leaf_report import LeafReport, size

_HEADER = ("leaf", "shape", "kind", "matrix", "side", "rank", "state", "Adam")
_TEXTS = 5  # columns to the left; numbers stand to the right


def table(leaves: Sequence[LeafReport], state: int, adam: int, adam_f32: int) -> str:
    """The leaves, folded, and the bytes of the whole state beside Adam's."""
    both = adam_f32 > adam
    header = (*_HEADER, "Adam, f32") if both else _HEADER
    width = len(header)
    rows = [header, *(_row(line)[:width] for line in fold(leaves))]
    share = f"{state / max(adam, 1):.0%} of Adam"
    total = ("total", "", share, "", "", "", *map(size, (state, adam, adam_f32)))
    return _ruled([*rows, total[:width]])


def legend(leaves: Sequence[LeafReport], both: bool) -> str:
    """What the columns hold."""
    folded = any(line.copies > 1 for line in fold(leaves))
    marked = any(map(_marked, leaves))
    lines = [
        "matrix: batch x (output x input); side: left projects the output, right the"
        " input",
        "state: projector and all that the inner holds; Adam: optax.adam's, in the"
        " leaf's dtype",
    ]
    if both:
        lines.append("Adam, f32: the same with f32 moments of 16-bit leaves")
    if folded:
        lines.append("{0..3}: equal leaves in one line, with the bytes of all")
    if marked:
        lines.append("!: more state than Adam's")
    return "\n".join(lines)


def of_devices(each: Any) -> tuple[str, ...]:
    """A line on what each device holds, where there are several."""
    if each is None or each.devices == 1:
        return ()
    return (
        f"on each of {each.devices} devices: {size(each.bytes)} of state, of which"
        f" {size(each.everywhere)} the same on all",
    )


def _marked(leaf: LeafReport) -> bool:
    """Whether more state is something to act on: a small leaf's scale in f32 is not."""
    return leaf.exceeds_adam and (leaf.is_projected or leaf.wider_bytes > 0)


def _row(line: Line) -> tuple[str, ...]:
    leaf, count = line.leaf, line.copies
    return (
        line.path or "(the tree itself)",
        "x".join(map(str, leaf.shape)),
        leaf.reason,
        leaf.matrix or "full size",
        leaf.side,
        str(leaf.rank or ""),
        size(count * leaf.state_bytes) + ("!" if _marked(leaf) else ""),
        size(count * leaf.adam_bytes),
        size(count * leaf.adam_f32_bytes),
    )


def _ruled(rows: Sequence[Sequence[str]]) -> str:
    """In columns, with rules below the first row and above the last."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_aligned(row, widths) for row in rows]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        text.ljust(width) if place < _TEXTS else text.rjust(width)
        for place, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
    return "  ".join(cells).rstrip()
