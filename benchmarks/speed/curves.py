# SPDX-License-Identifier: Apache-2.0
"""The pictures of the benchmarks of speed.

python -m benchmarks.speed.curves    # again, from the records alone
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from benchmarks.lib import pictures, records
from benchmarks.lib.subjects import ADAMW, OURS, THEIRS

COLOURS = {
    OURS: pictures.ORANGE,
    f"{OURS}, stagger=True": "#2b8a3e",
    ADAMW: "#3b4252",
    THEIRS: "#4292c6",
}
AXES = {
    "layers": "layers (width 512, rank 128)",
    "width": "width (one layer, rank a quarter)",
    "rank, width 512": "rank (width 512, 8 layers)",
    "rank, width 4096": "rank (width 4096, one layer)",
}


CAPTION = (
    "A step of the optimizer alone, without a refresh; forward and backward pass take"
    " as long with each. Floor: the FLOPs of the projections at the rate that products"
    " reach on this machine, and every array moved once at the speed of a copy. AdamW's"
    " has no projections."
)


def draw_cost(rows: Sequence[dict[str, Any]], name: str) -> None:
    """A step as a multiple of AdamW's above, of its own floor below; a curve a column.

    Args:
      rows: of `floor.py`.
      name: of a file in docs/images.
    """
    by_curve = {x: [row for row in rows if row["curve"] == x] for x in AXES}
    shown = {curve: chosen for curve, chosen in by_curve.items() if chosen}
    picture = pictures.figure(3.4 * len(shown) + 1, 6.4)
    grid = picture.subplots(2, len(shown), sharex="col", sharey="row", squeeze=False)
    for column, (curve, chosen) in enumerate(shown.items()):
        _multiples(pictures.plain(grid[0][column]), chosen)
        _ratios(pictures.plain(grid[1][column]), chosen)
        grid[1][column].set_xlabel(AXES[curve])
    most = max(ratio for row in rows for ratio in row["ratio"].values())
    grid[1][0].set_ylim(0, 1.1 * most)  # shared
    grid[0][0].set_ylabel("a step of the optimizer,\nin steps of optax.adamw")
    grid[1][0].set_ylabel("a step / its floor")
    for row, told in ((0, "optax.adamw"), (1, "the floor")):
        _line_at_one(grid[row], told)
    handles, labels = grid[0][0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside upper center", ncols=5, frameon=False)
    pictures.save(picture, name, CAPTION)


def _multiples(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    """Of the seconds of `optax.adamw`."""
    places = [row["x"] for row in rows]

    def plot(kind: str, name: str, style: str, label: str) -> None:
        times = [row[kind][name] / row["seconds"][ADAMW] for row in rows]
        told = {"color": COLOURS[name], "label": label, "markersize": 4}
        axes.plot(places, times, style, **told)

    for name in (THEIRS, OURS):
        plot("seconds", name, "o-", name)
    plot("floor", OURS, ":", f"floor of {OURS}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(places, [str(place) for place in places])


def _ratios(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    places = [row["x"] for row in rows]
    for name in rows[0]["ratio"]:
        ratios = [row["ratio"][name] for row in rows]
        axes.plot(places, ratios, "o-", color=COLOURS[name], markersize=4)
        axes.annotate(
            name, (places[0], ratios[0]), (0, 14), textcoords="offset points",
            fontsize=8, color=COLOURS[name],
        )  # fmt: skip


def _line_at_one(row: Sequence[Axes], told: str) -> None:
    """Named in the first column."""
    for axes in row:
        axes.axhline(1, color="black", linewidth=0.8)
    row[0].annotate(
        told, (1, 1), (0, -11), xycoords=row[0].get_yaxis_transform(),
        textcoords="offset points", ha="right", fontsize=8,
    )  # fmt: skip


def draw_trace(found: dict[str, Any], name: str) -> None:
    """The time of every step; the first of each trace begins a gap.

    Args:
      found: the result of `step_trace.py`.
      name: of a file in docs/images.
    """
    picture, gap = pictures.figure(8.4, 4.2), found["gap"]
    axes = pictures.plain(picture.subplots())
    for title, row in found["traces"].items():
        times = [1e3 * x for x in row["seconds"]]
        axes.plot(times, "o-", color=COLOURS[title], label=title, markersize=3)
    for start in range(0, len(times), gap):
        axes.axvline(start, color="grey", linewidth=0.6, linestyle="--", zorder=0)
    axes.set_yscale("log")
    axes.set_xlabel(f"step (a gap of {gap}; dashed: where it begins)")
    axes.set_ylabel("one step (ms)")
    axes.legend(frameon=False)
    pictures.save(picture, name)


if __name__ == "__main__":
    draw_cost(records.load("speed/floor")["points"], "step_cost")
