# SPDX-License-Identifier: Apache-2.0
"""The pictures of training: `docs/images/{ablations,pretraining_1m}.png`.

python -m benchmarks.training.draw    # again, from the records alone
"""

import math
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import MultipleLocator, NullLocator

from benchmarks.lib import pictures, records
from benchmarks.lib.pictures import BLUE, GREY, ORANGE

FAR = 0.1  # nats above the best
# Whose names would lie on those of their neighbours.
_BELOW = ("Adafactor", "LoRA", "AdamW, no clipping", "Fira")
_LEFT = ("AdamW",)


def ablations(found: dict[str, Any]) -> None:
    picture = pictures.figure(11, 6.4)
    left, right = picture.subplots(1, 2, width_ratios=(1, 1.1))
    _grid(pictures.plain(left), found["studies"][found["grid"]])
    others = {k: rows for k, rows in found["studies"].items() if k != found["grid"]}
    _dots(pictures.plain(right), others)
    pictures.save(picture, "ablations", _ablations_caption(found))


def _grid(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """A line a rank over the gaps, and a dot a seed."""
    ranks = sorted({row["rank"] for row in rows})
    gaps = sorted({row["gap"] for row in rows}, key=order)
    colours = colormaps[pictures.SEQUENCE](np.linspace(0.85, 0.0, len(ranks)))
    shifts = np.linspace(-0.09, 0.09, len(ranks))  # or dots would hide each other
    for rank, colour, shift in zip(ranks, colours, shifts, strict=True):
        mine = sorted(
            (row for row in rows if row["rank"] == rank),
            key=lambda row: order(row["gap"]),
        )
        places = [gaps.index(row["gap"]) + shift for row in mine]
        means = [row["mean"] for row in mine]
        axes.plot(places, means, "-", color=colour, label=f"rank {rank}", linewidth=1.8)
        for place, row in zip(places, mine, strict=True):
            seeds = np.full(len(row["losses"]), place)
            axes.plot(seeds, row["losses"], "o", color=colour, markersize=3.5)
    _cut(axes, rows, [gaps.index(row["gap"]) for row in rows])
    labels = ["only\nat step 0" if gap == "never" else gap for gap in gaps]
    axes.set_xticks(range(len(gaps)), labels)
    axes.set_xlabel("steps between refreshes of the subspace")
    axes.set_ylabel("final validation loss (nats per token)")
    axes.set_title("Rank and gap: lines are means, dots seeds", fontsize=10)
    axes.legend(frameon=False, fontsize=9)


def order(gap: int | str) -> float:
    """Never is the longest gap."""
    return np.inf if gap == "never" else float(gap)


def _cut(axes: Axes, rows: list[dict[str, Any]], places: list[int]) -> None:
    """Ends the axis where the others end, and names what lies far above them."""
    least = min(row["mean"] for row in rows)
    seen = [row for row in rows if row["mean"] < least + FAR]
    top = max(max(row["losses"]) for row in seen) + 0.01
    for place, row in zip(places, rows, strict=True):
        if row not in seen:
            told = f"{row['mean']:.2f} ↑\nrank {row['rank']}"
            axes.annotate(told, (place, top), ha="center", va="top", fontsize=8)
    axes.set_ylim(min(min(row["losses"]) for row in rows) - 0.01, top)


def _dots(axes: Axes, studies: dict[str, list[dict[str, Any]]]) -> None:
    """Of every setting, loss less that of the base with the same seed."""
    place, ticks, labels = 0.0, [], []
    for study, rows in studies.items():
        base = np.array(rows[0]["losses"])
        axes.annotate(
            f"{study} (base: {rows[0]['name']})", (0.01, place),
            xycoords=axes.get_yaxis_transform(), fontsize=8.5, weight="bold",
            va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )  # fmt: skip
        for row in rows[1:]:
            place += 1
            _row(axes, place, row, np.array(row["losses"]) - base)
            ticks.append(place)
            labels.append(row["name"])
        place += 1.3
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(ticks, labels)
    axes.set_ylim(place - 0.6, -0.7)
    axes.set_xlabel("loss less that of the base, same seed (nats per token)")
    axes.set_title("One change at a time: dots are seeds, bars 95 %", fontsize=10)


def _row(axes: Axes, place: float, row: dict[str, Any], seeds: np.ndarray) -> None:
    less = row["less_base"]
    colour = ORANGE if less["beyond_seeds"] else BLUE
    axes.plot([less["low"], less["high"]], [place] * 2, color=colour, linewidth=2.2)
    axes.plot(less["mean"], place, "|", color=colour, markersize=11, markeredgewidth=2)
    axes.plot(seeds, np.full(len(seeds), place), "o", color=GREY, markersize=3.5)


def _ablations_caption(found: dict[str, Any]) -> str:
    """The setting."""
    recipe, config = found["recipe"], found["recipe"]["config"]
    tokens = recipe["batch"] * recipe["tokens"]
    return (
        f"LLaMA of width {config['width']} and {config['layers']} layers on English"
        f" prose, {recipe['steps']} steps of {tokens} tokens, learning rate"
        f" {recipe['learning_rate']:g} for every setting (not tuned for each),"
        f" {recipe['seeds']} seeds, base {found['base']}. Right: a difference counts as"
        " more than seeds make if the 95 % interval of its mean, by seed, excludes zero"
        " (orange); one of twenty does so by chance."
    )


def pretraining(found: dict[str, Any], model: str) -> None:
    rows = {
        name: row
        for name, row in found["rows"].items()
        if name != found["control"] and row["tuned"]
    }
    picture = pictures.figure(12, 5.2)
    left, right = picture.subplots(1, 2)
    tints = colormaps["tab20"](range(len(rows)))
    colours = dict(zip(rows, tints, strict=True))
    _cost(pictures.plain(left), rows, colours)
    _rates(pictures.plain(right), rows, colours)
    lines, names = right.get_legend_handles_labels()
    picture.legend(lines, names, loc="outside right center", frameon=False, fontsize=8)
    pictures.save(picture, f"pretraining_{model}", _pretraining_caption(found))


def _cost(axes: Axes, rows: dict[str, Any], colours: dict[str, Any]) -> None:
    """Perplexity over memory: a dot a seed, a line from least to most, a name above."""
    taken: list[float] = []
    for name, row in rows.items():
        memory, values = row["bf16_bytes"]["total"] / 1e6, row["perplexities"]
        beside = taken.count(memory)
        place = memory * (1 + 0.008 * beside)  # equal ones side by side
        taken.append(memory)
        axes.plot([place] * len(values), values, "o-", color=colours[name], ms=4)
        _name(axes, name, (place, values), colours[name])
    axes.margins(x=0.13, y=0.1)
    axes.annotate(
        "lower left\nis better", (0.02, 0.02), xycoords="axes fraction",
        fontsize=8.5, style="italic", color=GREY,
    )  # fmt: skip
    axes.set_xlabel("weights and optimizer state, two bytes an entry (MB)")
    axes.set_ylabel("validation perplexity")
    axes.set_title("At the best learning rate: dots are seeds", fontsize=10)


def _name(axes: Axes, name: str, at: tuple[float, Any], colour: Any) -> None:
    (place, values), below = at, name in _BELOW
    axes.annotate(
        name, (place, min(values) if below else max(values)), (0, -6 if below else 6),
        textcoords="offset points", ha="right" if name in _LEFT else "center",
        va="top" if below else "bottom", fontsize=8, color=colour,
    )  # fmt: skip


def _rates(axes: Axes, rows: dict[str, Any], colours: dict[str, Any]) -> None:
    """Seed 0 over the grid, at the better ratio of each method."""
    for name, row in rows.items():
        grid = row["grid"][f"matrices at {row['ratio']:g}"]
        points = [(float(rate), loss) for rate, loss in grid.items() if loss]
        rates = [rate * row["ratio"] for rate, _ in points]
        values = [math.exp(loss) for _, loss in points]
        axes.plot(rates, values, "o-", color=colours[name], label=name, ms=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")  # one that diverges would flatten the others
    axes.yaxis.set_major_locator(MultipleLocator(2))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    ticks = sorted({rate for line in axes.lines for rate in line.get_xdata()})
    axes.set_xticks(ticks, [f"{rate:.2g}" for rate in ticks], rotation=45)
    axes.set_xlabel("learning rate of the layers' matrices")
    axes.set_title("How it was tuned: one seed, the better ratio", fontsize=10)


def _pretraining_caption(found: dict[str, Any]) -> str:
    budget = found["budget"]
    return (
        f"LLaMA {budget['model']}, {budget['steps']} steps of {budget['batch']} x"
        f" {budget['tokens']} tokens of `{budget['corpus']}`, rank {budget['rank']},"
        f" a refresh every {budget['gap']} steps."
    )


if __name__ == "__main__":
    ablations(records.load("training/ablations"))
    pretraining(records.load("training/pretraining_1m"), "1m")
