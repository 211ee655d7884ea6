# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown: each a function of the records that it is made from.

Scripts print the table of what they measured; `report.py` writes it into documents.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Function = Callable[..., str]
TABLES: dict[
    str, tuple[tuple[str, ...], Function]
] = {}  # records and function, by name
INTERVAL = "95 % interval", "more than seeds make"


def of(*records: str, name: str = "") -> Callable[[Function], Function]:
    """Registers a function as the table `name`, its own by default, of `records`."""

    def register(function: Function) -> Function:
        TABLES[name or function.__name__] = records, function
        return function

    return register


def made(name: str, load: Callable[[str], Any]) -> str:
    """The table called `name`, of the records that `load` finds.

    Raises:
      ValueError: there is none.
    """
    if name not in TABLES:
        known = ", ".join(sorted(TABLES))
        raise ValueError(f"no table is called {name!r}; known: {known}.")
    records, function = TABLES[name]
    return function(*map(load, records))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def model(name: str) -> str:
    """7B for 7b."""
    return name[:-1] + name[-1].upper()


def signed(share: float, digits: int = 1) -> str:
    """A relative difference in per cent, with a true minus."""
    return f"{100 * share:+.{digits}f} %".replace("-", "−")


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.2f}"


def mean_and_deviation(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def less(found: dict[str, Any], digits: int = 4) -> tuple[str, str, str]:
    """Cells of a paired difference: mean, interval, verdict."""
    interval = f"{found['low']:+.{digits}f} to {found['high']:+.{digits}f}"
    said = "yes" if found["beyond_seeds"] else "no"
    return f"{found['mean']:+.{digits}f}", interval, said
