# SPDX-License-Identifier: Apache-2.0
"""The pictures of the benchmarks of speed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.lib import common

IMAGES = common.ROOT / "docs" / "images"
COLOURS = {
    "galore_optax": "#d94801",
    "galore_optax, stagger=True": "#2b8a3e",
    "optax.adamw": "#3b4252",
    "optax.contrib.galore": "#4292c6",
}
AXES = {
    "layers": "layers (width 512, rank 128)",
    "width": "width (one layer, rank a quarter)",
    "rank, width 512": "rank (width 512, 8 layers)",
    "rank, width 4096": "rank (width 4096, one layer)",
}


def draw_cost(rows: Sequence[dict[str, Any]], name: str) -> Path:
    """Seconds of a step beside its floor above, their ratio below; one curve a column.

    Args:
      rows: of `floor.py`.
      name: of a file in docs/images.
    """
    shown = [curve for curve in AXES if any(row["curve"] == curve for row in rows)]
    figure = Figure(figsize=(3.4 * len(shown) + 1, 6.4))
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(shown), sharex="col", sharey="row", squeeze=False)
    for column, curve in enumerate(shown):
        chosen = [row for row in rows if row["curve"] == curve]
        _seconds(grid[0][column], chosen)
        _ratios(grid[1][column], chosen)
        grid[1][column].set_xlabel(AXES[curve])
    most = max(ratio for row in rows for ratio in row["ratio"].values())
    grid[1][0].set_ylim(0, 1.1 * most)  # shared
    grid[0][0].set_ylabel("one steady step (ms)")
    grid[1][0].set_ylabel("measured / floor")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=5, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    return _save(figure, name)


def _seconds(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    places = [row["x"] for row in rows]
    for name in rows[0]["seconds"]:
        times = [1e3 * row["seconds"][name] for row in rows]
        axes.plot(places, times, "o-", color=COLOURS[name], label=name, markersize=4)
    for name in rows[0]["floor"]:
        times = [1e3 * row["floor"][name] for row in rows]
        axes.plot(places, times, ":", color=COLOURS[name], label=f"floor of {name}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(places, [str(place) for place in places])
    _plain(axes)


def _ratios(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    places = [row["x"] for row in rows]
    for name in rows[0]["ratio"]:
        ratios = [row["ratio"][name] for row in rows]
        axes.plot(places, ratios, "o-", color=COLOURS[name], markersize=4)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.axhline(1.3, color="grey", linewidth=0.8, linestyle="--")
    _plain(axes)


def draw_trace(traces: dict[str, list[float]], gap: int, name: str) -> Path:
    """The time of every step.

    Args:
      traces: seconds by what is timed; the first step of each begins a gap.
      gap: steps between refreshes.
      name: of a file in docs/images.
    """
    figure = Figure(figsize=(8.4, 4.2))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for title, seconds in traces.items():
        times = [1e3 * x for x in seconds]
        axes.plot(times, "o-", color=COLOURS[title], label=title, markersize=3)
    for start in range(0, max(map(len, traces.values())), gap):
        axes.axvline(start, color="grey", linewidth=0.6, linestyle="--", zorder=0)
    axes.set_yscale("log")
    axes.set_xlabel(f"step (a gap of {gap}; dashed: where it begins)")
    axes.set_ylabel("one step (ms)")
    axes.legend(frameon=False)
    _plain(axes)
    figure.tight_layout()
    return _save(figure, name)


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, which="major")


def _save(figure: Any, name: str) -> Path:
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / name, dpi=150)
    print(f"wrote {IMAGES.name}/{name}")
    return IMAGES / name
