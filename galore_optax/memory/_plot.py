# SPDX-License-Identifier: Apache-2.0
"""Plans as stacked bars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from galore_optax.memory._estimate import Plan

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
    figure_class, canvas_class = _matplotlib()
    figure = figure_class(figsize=(2.6 + 1.35 * max(len(plans), 2), 5.2))
    canvas = canvas_class(figure)
    suffix = Path(path).suffix.removeprefix(".")
    if suffix not in canvas.get_supported_filetypes():
        raise ValueError(f"{str(path)!r} names no format of images; write FILE.png.")
    axes = figure.add_subplot()
    _bars(axes, plans)
    if budget is not None:
        label = f"budget, {budget / 1e9:.4g} GB"
        axes.axhline(budget / 1e9, color="black", linestyle="--", label=label)
    _decorate(axes, plans, budget, title)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "drawing needs matplotlib, which is not installed:"
            ' pip install "galore_optax[plan]"'
        ) from error
    return Figure, FigureCanvasAgg


def _bars(axes: Any, plans: Sequence[Plan]) -> None:
    places = range(len(plans))
    heights = [0.0] * len(plans)
    visible = _VISIBLE * max(plan.total for plan in plans)
    for name, colour in _COLOURS.items():
        sizes = [plan.terms[name] for plan in plans]
        label = name if max(sizes) > visible else None
        tall = [size / 1e9 for size in sizes]
        axes.bar(places, tall, 0.62, bottom=heights, color=colour, label=label)
        heights = [height + more for height, more in zip(heights, tall, strict=True)]
    for place, height in zip(places, heights, strict=True):
        axes.annotate(
            f"{height:.3g}", (place, height), (0, 3), textcoords="offset points",
            ha="center", va="bottom",
        )  # fmt: skip


def _decorate(axes: Any, plans: Sequence[Plan], budget: int | None, title: str) -> None:
    highest = max(plan.total for plan in plans)
    axes.set_ylim(0, 1.08 * max(highest, budget or 0) / 1e9)
    axes.set_xlim(-0.6, len(plans) - 0.4)
    labels = [
        plan.name.replace("(", "\n").replace(", ", "\n").rstrip(")") for plan in plans
    ]
    axes.set_xticks(range(len(plans)), labels, fontsize=9)
    axes.set_ylabel("memory (GB, 10⁹ bytes)")
    axes.set_xlabel("optimizer")
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], names[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5),
        frameon=False,
    )  # fmt: skip
