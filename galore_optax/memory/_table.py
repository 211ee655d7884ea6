# SPDX-License-Identifier: Apache-2.0
"""Plans and comparisons as text."""

from collections.abc import Iterable, Mapping, Sequence

from galore_optax.memory._estimate import Plan


def gigabytes(number: int) -> str:
    """Bytes in GB (10^9), MB or kB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(number) >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number} B"


def table(plans: Sequence[Plan]) -> str:
    """Plans side by side, a line a term, in decimal units.

    Args:
      plans: of one model and setting, usually.

    Returns:
      text without a final newline; zero terms are left empty.

    Example:
      >>> from galore_optax import memory
      >>> print(memory.table([memory.plan("9m", "adamw")]))
                                adamw
      -------------------------------
      weights                17.99 MB
      first moments, bf16    17.99 MB
      second moments, bf16   17.99 MB
      other                       4 B
      gradients               8.19 MB
      activations            62.91 MB
      workspace             131.07 kB
      -------------------------------
      total                 125.21 MB
      at the peak                head
    """
    rows = _headings(plans)
    heading = len(rows) - 1
    columns = [_terms_by_dtype(plan) for plan in plans]
    rows += [
        [name, *(_cell(column.get(name, 0)) for column in columns)]
        for name in _in_order(plans[0].terms, columns)
        if any(column.get(name) for column in columns)
    ]
    rows += [["total", *(gigabytes(plan.total) for plan in plans)]]
    rows += [["at the peak", *(plan.peak.name for plan in plans)]]
    return ruled(rows, after=(heading, -3))


def _headings(plans: Sequence[Plan]) -> list[list[str]]:
    """Names, and below them their options if there are any."""
    pairs = [plan.name.removesuffix(")").partition("(")[::2] for plan in plans]
    rows = [["", *column] for column in zip(*pairs, strict=True)]
    return rows if any(rows[1]) else rows[:1]


def _terms_by_dtype(plan: Plan) -> dict[str, int]:
    """The terms of a plan, those of moments a line for each of their dtypes."""
    found: dict[str, int] = {}
    for name, size in plan.terms.items():
        parts = plan.state.dtypes.get(name.replace(" ", "_"))
        found |= (
            {f"{name}, {k}": n for k, n in parts.items()} if parts else {name: size}
        )
    return found


def _in_order(terms: Iterable[str], columns: Sequence[Mapping[str, int]]) -> list[str]:
    places = {name: place for place, name in enumerate(terms)}
    names = dict.fromkeys(name for column in columns for name in column)
    return sorted(names, key=lambda name: (places[name.partition(", ")[0]], name))


def against_adamw(plans: Sequence[Plan]) -> str:
    """The state of `optax.adamw` for 16-bit weights, and which plans exceed it."""
    adamw, in_f32 = plans[0].adamw, plans[0].adamw_f32
    told = (
        f"state of optax.adamw: {gigabytes(adamw)} with moments in the dtype of the"
        f" weights, {gigabytes(in_f32)} in f32"
    )
    warned = (_exceeds(plan) for plan in plans if plan.state.total > plan.adamw)
    return "\n".join([*([told] if in_f32 > adamw else []), *warned])


def _exceeds(plan: Plan) -> str:
    cures = ["a lower rank"] if plan.state.projectors else []
    return (
        f"warning: the state of {plan.name}, {gigabytes(plan.state.total)}, exceeds"
        f" optax.adamw's, {gigabytes(plan.adamw)}. Less takes"
        f" {' or '.join([*cures, 'moments in eight bits'])}."
    )


def notes(plans: Sequence[Plan]) -> str:
    """What the plans leave out, a line each."""
    found = dict.fromkeys(text for plan in plans for text in plan.not_modelled)
    return "\n".join(f"not modelled: {text}" for text in found)


def _cell(number: int) -> str:
    return gigabytes(number) if number else ""


def ruled(rows: Sequence[Sequence[str]], after: Sequence[int]) -> str:
    """Rows in columns, all but the first to the right; rules after some of them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [_line(row, widths) for row in rows]
    places = sorted((index % len(rows) for index in after), reverse=True)
    for place in places:
        lines.insert(place + 1, "-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join(lines)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (
        cell.rjust(width) if index else cell.ljust(width)
        for index, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *rest]).rstrip()
