# SPDX-License-Identifier: Apache-2.0
"""Equal leaves of equal layers in one line."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from galore_optax._asking.leaf_report import LeafReport

# A number that is a component of a path, or the end of one: blocks/0, layers_0.
_NUMBER = re.compile(r"(?<![^/_])(\d+)(?![^/])")


class Line(NamedTuple):
    """Leaves that differ in numbers of their paths alone."""

    parts: tuple[str, ...]  # of the path; those at odd places are numbers
    leaf: LeafReport  # the first
    copies: int

    @property
    def path(self) -> str:
        return "".join(self.parts)


def fold(leaves: Iterable[LeafReport]) -> list[Line]:
    """One line for equal leaves of equal layers, as `blocks/{0..31}/up/kernel`."""
    lines = [Line(tuple(_NUMBER.split(leaf.path)), leaf, 1) for leaf in leaves]
    longest = max((len(line.parts) for line in lines), default=0)
    for place in range(1, longest, 2):
        lines = _fold_at(lines, place)
    return lines


def _fold_at(lines: Sequence[Line], place: int) -> list[Line]:
    groups: dict[Any, list[Line]] = {}
    for line in lines:
        groups.setdefault(_alike(line, place), []).append(line)
    return [_joined(group, place) for group in groups.values()]


def _alike(line: Line, place: int) -> Any:
    others = line.parts[:place], line.parts[place + 1 :]
    return len(line.parts) > place, *others, line.copies, *_told(line.leaf)


def _told(leaf: LeafReport) -> tuple[Any, ...]:
    text = leaf.shape, leaf.dtype, leaf.reason, leaf.matrix, leaf.side, leaf.rank
    return *text, leaf.state_bytes, leaf.adam_bytes


def _joined(group: Sequence[Line], place: int) -> Line:
    first = group[0]
    if len(group) == 1:
        return first
    numbers = f"{{{_runs(sorted(int(line.parts[place]) for line in group))}}}"
    parts = (*first.parts[:place], numbers, *first.parts[place + 1 :])
    return Line(parts, first.leaf, sum(line.copies for line in group))


def _runs(numbers: Sequence[int]) -> str:
    """Three or more in a row as `0..2`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(map(_run, runs))


def _run(run: Sequence[int]) -> str:
    return f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run))
