# SPDX-License-Identifier: Apache-2.0
"""What the pictures in docs/images share: where they go, how they look, captions."""

import textwrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib import records

IMAGES = records.ROOT / "docs" / "images"
# Two optimizers or three series: dark enough on white, and apart for the colour-blind.
BLUE, ORANGE, GREY = "#08519c", "#d94801", "#737373"
SEQUENCE = "viridis"
_CHARACTERS_AN_INCH = 17


def figure(width: float, height: float) -> Figure:
    """Inches."""
    return Figure(figsize=(width, height), layout="constrained")


def plain(axes: Axes) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.tick_params(labelsize=8)
    return axes


def save(picture: Figure, name: str, caption: str = "") -> None:
    """Writes `docs/images/<name>.png`, the caption below the picture."""
    if caption:
        columns = int(picture.get_figwidth() * _CHARACTERS_AN_INCH)
        text = textwrap.fill(caption, columns)
        picture.supxlabel(text, fontsize=8, x=0.01, ha="left", linespacing=1.35)
    IMAGES.mkdir(parents=True, exist_ok=True)
    picture.savefig(IMAGES / f"{name}.png", dpi=150)
    print(f"wrote docs/images/{name}.png")
