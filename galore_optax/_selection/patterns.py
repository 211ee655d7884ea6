# SPDX-License-Identifier: Apache-2.0
"""Values by regular expressions over the paths of leaves; the first found decides."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Patterns(Generic[T]):
    """A value for each pattern, in their order."""

    name: str  # of the argument, for errors
    rules: tuple[tuple[re.Pattern[str], T], ...]

    def first(self, path: str) -> tuple[re.Pattern[str], T] | None:
        """The first pattern found anywhere in `path`, with its value."""
        return next((rule for rule in self.rules if rule[0].search(path)), None)

    def at(self, path: str) -> T:
        """The value for the leaf at `path`, which some pattern has to match.

        Raises:
          ValueError: none does.
        """
        found = self.first(path)
        if found is None:
            last = self.rules[-1][1]
            raise ValueError(
                f"{self.name} says nothing about '{path}', which is projected: no"
                " pattern matches it. Add one for all others at the end, such as"
                f" r'.*': {last!r}."
            )
        return found[1]

    def check_matches(self, paths: Iterable[str]) -> None:
        """Raises unless each pattern matches some path, and may decide one."""
        paths = tuple(paths)
        for pattern, _ in self.rules:
            if not any(map(pattern.search, paths)):
                raise ValueError(
                    f"{self.name} has the pattern {pattern.pattern!r}, which matches no"
                    f" leaf. The leaves are: {listing(paths)}. Correct the pattern, or"
                    " leave it out."
                )
        takes_all = [all(map(rule.search, paths)) for rule, _ in self.rules]
        first = takes_all.index(True) if True in takes_all else len(takes_all)
        for number in range(first + 1, len(self.rules)):
            if not takes_all[number]:
                raise ValueError(
                    f"{self.name} has the pattern {self.rules[number][0].pattern!r}"
                    f" after {self.rules[first][0].pattern!r}, which matches every leaf"
                    " and decides first. Put it ahead of that one."
                )


def compile_rules(
    name: str, rules: Mapping[str, T]
) -> tuple[tuple[re.Pattern[str], T], ...]:
    """Raises `re.error` where a pattern is no regular expression."""
    return tuple((_compiled(name, pattern), value) for pattern, value in rules.items())


def _compiled(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        message = f"{name} has the pattern {pattern!r}: {error.msg}"
        raise re.error(message, error.pattern, error.pos) from None


def per_leaf(name: str, value: Any, check: Callable[..., Any]) -> Any:
    """An argument that may differ by leaf, checked as far as it can be without one.

    Args:
      name: of the argument.
      value: one for all leaves, a callable of a `Leaf`, or a dictionary by pattern.
      check: raises where a value is out of range, given it and where it stands.

    Returns:
      `value`, a dictionary as `Patterns`.

    Raises:
      TypeError: `value` is what `match_paths` makes, which is of whole trees.
      ValueError: a dictionary is empty; and as `check`.
    """
    if isinstance(value, Mapping):
        return _by_path(name, value, check)
    if isinstance(value, Patterns):
        raise TypeError(
            f"{name} was given what match_paths makes for weight_dimension_numbers."
            f" Give the dictionary itself: {name}={{pattern: value, ...}}."
        )
    if not callable(value):
        check(value)
    return value


def _by_path(
    name: str, rules: Mapping[str, Any], check: Callable[..., Any]
) -> Patterns[Any]:
    if not rules:
        raise ValueError(
            f"{name}={{}} names no pattern. Give one, such as {{r'attn': ...,"
            " r'.*': ...}, or one value for all leaves."
        )
    for pattern, value in rules.items():
        check(value, pattern)
    return Patterns(name, compile_rules(name, rules))


def listing(paths: tuple[str, ...], most: int = 8) -> str:
    """The first paths, and how many more there are."""
    more = f", and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(repr(path) for path in paths[:most]) + more
