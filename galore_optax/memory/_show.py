# SPDX-License-Identifier: Apache-2.0
"""Plans as text, and as stacked bars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from galore_optax.memory._plan import Plan

# Weights dark, the optimizer's state in one family of colours, the step in another.
_COLOURS = {
    "weights": "#3b4252",
    "projectors": "#8c2d04",
    "first moments": "#d94801",
    "second moments": "#fd8d3c",
    "scales": "#fdbe85",
    "other": "#d9d9d9",
    "gradients": "#08519c",
    "activations": "#4292c6",
    "workspace": "#9ecae1",
}
_VISIBLE = 1e-3  # share of the highest bar below which a term is not in the legend


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
      activations            62.91 MB
      workspace             131.07 kB
      -------------------------------
      total                 117.02 MB
      at the peak                head
    """
    pairs = [plan.name.removesuffix(")").partition("(")[::2] for plan in plans]
    heads = [["", *column] for column in zip(*pairs, strict=True)]
    heads = heads if any(heads[1]) else heads[:1]
    found: dict[str, list[str]] = {}
    for place, plan in enumerate(plans):
        for name, size in _by_dtype(plan).items():
            row = found.setdefault(name, [""] * len(plans))
            row[place] = gigabytes(size)
    order = list(plans[0].terms)
    names = sorted(found, key=lambda x: (order.index(x.partition(", ")[0]), x))
    ends = [
        ["total", *(gigabytes(plan.total) for plan in plans)],
        ["at the peak", *(plan.peak.name for plan in plans)],
    ]
    rows = [*heads, *([name, *found[name]] for name in names), *ends]
    return ruled(rows, after=(len(heads) - 1, -3))


def _by_dtype(plan: Plan) -> dict[str, int]:
    """Terms that are not zero, those of moments a line for each of their dtypes."""
    found: dict[str, int] = {}
    for name, size in plan.terms.items():
        parts = plan.state.dtypes.get(name.replace(" ", "_"), {})
        found |= {f"{name}, {dtype}": n for dtype, n in parts.items()} or {name: size}
    return {name: size for name, size in found.items() if size}


def against_adamw(plans: Sequence[Plan]) -> str:
    """The state of `optax.adamw` for 16-bit weights, and which plans exceed it."""
    adamw, in_f32 = plans[0].adamw, plans[0].adamw_f32
    told = (
        f"state of optax.adamw: {gigabytes(adamw)} with moments in the dtype of the"
        f" weights, {gigabytes(in_f32)} in f32"
    )
    warned = [
        f"warning: the state of {plan.name}, {gigabytes(plan.state.total)}, exceeds"
        f" optax.adamw's, {gigabytes(plan.adamw)}. Less takes"
        f" {'a lower rank or ' * (plan.state.projectors > 0)}moments in eight bits."
        for plan in plans
        if plan.state.total > adamw
    ]
    return "\n".join([told] * (in_f32 > adamw) + warned)


def notes(plans: Sequence[Plan]) -> str:
    """What the plans leave out, a line each."""
    found = dict.fromkeys(text for plan in plans for text in plan.not_modelled)
    return "\n".join(f"not modelled: {text}" for text in found)


def ruled(rows: Sequence[Sequence[str]], after: Sequence[int]) -> str:
    """Rows in columns, all but the first to the right; rules after some of them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    places = {index % len(rows) for index in after}
    lines = []
    for place, (first, *rest) in enumerate(rows):
        cells = (x.rjust(n) for x, n in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
        if place in places:
            lines.append("-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join(lines)


def draw(
    plans: Sequence[Plan], path: str | Path, budget: int | None = None, title: str = ""
) -> None:
    """Writes a stacked bar for each plan, in GB of 10^9 bytes.

    Args:
      plans: one bar each, labelled with their names.
      path: of a PNG file, or of another format that matplotlib knows by its ending.
      budget: bytes, drawn as a line.
      title: above the bars.

    Raises:
      ImportError: matplotlib is missing; the extra that brings it is named.
      ValueError: the ending of `path` is no format of images.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib, which is not installed:"
            ' pip install "galore_optax[plan]"'
        ) from error
    figure = Figure(figsize=(2.6 + 1.35 * max(len(plans), 2), 5.2))
    axes = figure.add_subplot(
        xlabel="optimizer", ylabel="memory (GB, 10⁹ bytes)", title=title
    )
    _bars(axes, plans)
    if budget is not None:
        label = f"budget, {budget / 1e9:.4g} GB"
        axes.axhline(budget / 1e9, color="black", linestyle="--", label=label)
    axes.margins(y=0.08)
    axes.legend(reverse=True, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _bars(axes: Any, plans: Sequence[Plan]) -> None:
    places = range(len(plans))
    tops = [0.0] * len(plans)
    visible = _VISIBLE * max(plan.total for plan in plans)
    for name, colour in _COLOURS.items():
        sizes = [plan.terms[name] for plan in plans]
        label = name if max(sizes) > visible else None
        tall = [size / 1e9 for size in sizes]
        bars = axes.bar(places, tall, 0.62, bottom=tops, color=colour, label=label)
        tops = [top + more for top, more in zip(tops, tall, strict=True)]
    axes.bar_label(bars, [f"{top:.3g}" for top in tops], padding=3)
    labels = (plan.name.replace("(", "\n").replace(", ", "\n") for plan in plans)
    axes.set_xticks(places, [label.rstrip(")") for label in labels])
