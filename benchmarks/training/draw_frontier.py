# SPDX-License-Identifier: Apache-2.0
"""The picture of `frontier.py`: `docs/images/frontier_1m.png`."""

from typing import Any

from matplotlib.axes import Axes

from benchmarks.lib import pictures
from benchmarks.lib.pictures import BLUE, GREY, ORANGE

WIDE, HIGH = 0.2, 0.045  # of the picture: the room of a name
ASIDE = 0.12  # MB, from a dot to its name


def frontier(found: dict[str, Any], model: str) -> None:
    """Loss over bytes: a dot a method, a bar over its seeds, a line along the best."""
    picture = pictures.figure(9, 5.6)
    axes = pictures.plain(picture.subplots())
    entries = found["entries"]
    best = [x for x in entries if x["frontier"]]
    _steps(axes, best, max(x["total"] for x in entries))
    for entry, height in zip(entries, _heights(entries), strict=True):
        _entry(axes, entry, height)
    axes.margins(x=0.15)
    base = next(x for x in entries if x["name"] == found["base"])
    axes.axhspan(min(base["losses"]), max(base["losses"]), color=GREY, alpha=0.15)
    axes.set_xlabel("weights, gradients and optimizer state, two bytes an entry (MB)")
    axes.set_ylabel("validation loss (nats per token)")
    pictures.save(picture, f"frontier_{model}", _caption(found, model))


def _steps(axes: Axes, best: list[dict[str, Any]], end: float) -> None:
    places = [x["total"] / 1e6 for x in best] + [end / 1e6]
    losses = [x["loss"] for x in best]
    axes.step(places, [*losses, losses[-1]], where="post", color=GREY, linewidth=1)


def _heights(entries: list[dict[str, Any]]) -> list[float]:
    """Where names stand: at their losses, or lower where another's is in the way."""
    losses, taken = [x["loss"] for x in entries], []
    width = WIDE * (max(x["total"] for x in entries) - min(x["total"] for x in entries))
    gap = HIGH * (max(losses) - min(losses))
    for entry in sorted(entries, key=lambda x: -x["loss"]):
        beside = [y for x, y in taken if abs(x - entry["total"]) < width]
        taken.append((entry["total"], min([entry["loss"], *(y - gap for y in beside)])))
    order = sorted(range(len(entries)), key=lambda n: -losses[n])
    return [taken[order.index(n)][1] for n in range(len(entries))]


def _entry(axes: Axes, entry: dict[str, Any], height: float) -> None:
    colour = ORANGE if entry["family"] else BLUE
    place, losses = entry["total"] / 1e6, entry["losses"]
    filled = colour if entry["way"] == "formed" else "white"
    axes.plot([place] * 2, [min(losses), max(losses)], color=colour, linewidth=1)
    axes.plot(place, entry["loss"], "o", color=colour, markerfacecolor=filled, zorder=4)
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 0}
    axes.annotate(
        entry["name"], (place, entry["loss"]), (place + ASIDE, height),
        fontsize=7.5, color=colour, va="center", zorder=3, arrowprops=line,
        weight="bold" if entry["frontier"] else "normal",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
    )  # fmt: skip


def _caption(found: dict[str, Any], model: str) -> str:
    return (
        f"LLaMA {model}, each method at its best rate and ratio, three seeds: a dot is"
        " their mean, a bar from the least to the most. Orange is GaLore's family; a"
        " hollow dot has gradients of matrices never formed. Bold, on the grey line:"
        f" none has fewer bytes and a smaller loss. Grey band: the seeds of"
        f" {found['base']}."
    )
