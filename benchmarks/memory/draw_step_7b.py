# SPDX-License-Identifier: Apache-2.0
"""Draws the picture of the README from the record of `step_7b.py`.

python -m benchmarks.memory.draw_step_7b
"""

from typing import Any

from matplotlib.axes import Axes

from benchmarks.lib import pictures, records
from benchmarks.lib.front_tables import way
from benchmarks.lib.pictures import BLUE, GREY, ORANGE

Found = dict[str, Any]
STATE = "projectors", "first moments", "second moments", "scales", "other"
PARTS = {
    "weights": GREY,
    "optimizer state": ORANGE,
    "gradients, activations": BLUE,
}
NAMES = {
    "adamw": "AdamW",
    "adamw8bit": "8-bit AdamW",
    "adafactor": "Adafactor",
    "galore_adamw8bit": "8-bit GaLore",
}


def parts(row: Found) -> tuple[float, float, float]:
    """GB of weights, of state, and of all else that the compiler assigns."""
    weights = row["estimate"]["weights"]
    state = sum(row["estimate"][term] for term in STATE)
    return (
        weights / 1e9,
        state / 1e9,
        (row["compiler"]["total"] - weights - state) / 1e9,
    )


def label(row: Found) -> str:
    name, held = NAMES[row["method"].partition("(")[0]], way(row)
    held = held.removeprefix("gradients ")
    return name if held == "all" else f"{name},\n{held}"


def bars(axes: Axes, rows: list[Found]) -> None:
    lefts = [0.0] * len(rows)
    sizes = zip(*map(parts, rows), strict=True)
    for (name, colour), widths in zip(PARTS.items(), sizes, strict=True):
        places = range(len(rows))
        made = axes.barh(places, widths, 0.68, lefts, color=colour, label=name)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    totals = [f"{left:.1f} GB" for left in lefts]
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    axes.bar_label(made, totals, padding=5, fontsize=12, bbox=white, zorder=3)
    axes.set_yticks(range(len(rows)), map(label, rows), fontsize=12)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.19 * max(lefts))


def draw() -> None:
    found = records.load("memory/step_7b")
    picture = pictures.figure(7.2, 5.2)
    axes = pictures.plain(picture.subplots())
    bars(axes, found["rows"])
    axes.grid(axis="y", visible=False)
    card = found["card"] / 1e9
    axes.axvline(card, color="black", linestyle="--", linewidth=1)
    axes.text(card + 0.4, 7.35, f"RTX 4090: {card:.1f}", fontsize=11, va="bottom")
    axes.legend(loc=(0.6, 0.33), fontsize=11, frameon=False)
    title = "A training step of LLaMA-7B: bf16, 2,048 tokens, remat; GB"
    picture.suptitle(title, fontsize=12, x=0.01, ha="left")
    pictures.save(picture, "step_7b")


if __name__ == "__main__":
    draw()
