# SPDX-License-Identifier: Apache-2.0
"""Draws the three ways of a gradient from the records of `never_formed.py`.

python -m benchmarks.memory.draw
"""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from benchmarks.lib import pictures, records
from benchmarks.lib.pictures import BLUE, GREY, ORANGE

Found = dict[str, Any]
MODEL, TOKENS, CARD = "7b", 256, 25.35  # GB of an RTX 4090
NAMES = ("AdamW", "GaLore,\nall formed", "a layer's\nat a time", "never\nformed")
COLOURS = (GREY, ORANGE, ORANGE, BLUE)
CAPTION = (
    "One training step of LLaMA-7B: bf16, rank 1024, moments of GaLore in eight bits,"
    " rematerialised, 256 tokens; a refresh included, in three shares without"
    " gradients. Memory as XLA assigns it for a card of 25.35 GB (dashed); FLOPs of all"
    " products, from the jaxpr, at the paper's batch; bytes that eight devices reduce"
    " in a step, from shapes."
)


def memory(found: Found) -> list[float]:
    def row(method: str, gradients: str, shares: int) -> float:
        wanted = (method, gradients, shares, TOKENS, 1)
        keys = "method", "gradients", "shares", "tokens", "accumulation"
        rows = (x for x in found["rows"] if tuple(x["case"][k] for k in keys) == wanted)
        return max(x["total"] for x in rows) / 1e9

    galore = "galore_adamw8bit"
    kinds = ("formed", 1), ("layerwise", 1), ("never", 3)
    return [row("adamw", "formed", 1), *(row(galore, *kind) for kind in kinds)]


def flops(found: Found) -> list[float]:
    row = next(x for x in found["rows"] if x["model"] == MODEL and x["remat"])
    formed, never = (row[kind] / row["adamw"] for kind in ("formed", "never"))
    return [1.0, formed, formed, never]


def wire(found: Found) -> list[float]:
    rows = (x for x in found["rows"] if x["dtype"] == "bfloat16")
    row = next(x for x in rows if x["model"] == MODEL)
    formed, never = (row[kind] / 1e9 for kind in ("formed", "never"))
    return [formed, formed, formed, never]


def bars(axes: Axes, title: str, values: Sequence[float], form: str) -> None:
    pictures.plain(axes).set_title(title, fontsize=10)
    made = axes.bar(NAMES, values, color=COLOURS, width=0.65)
    axes.bar_label(made, fmt=form, fontsize=9, label_type="center", color="white")
    axes.grid(axis="x", visible=False)
    axes.set_ylim(0, 1.12 * max(values))


def draw() -> None:
    picture = pictures.figure(11, 3.9)
    panels = picture.subplots(1, 3)
    load = records.load
    held = memory(load("memory/never_formed_bytes"))
    bars(panels[0], "memory, GB", held, "%.1f")
    panels[0].axhline(CARD, color="black", linestyle="--", linewidth=0.9)
    counted = flops(load("memory/never_formed_flops"))
    bars(panels[1], "FLOPs, of AdamW's", counted, "%.2f")
    reduced = wire(load("memory/never_formed_wire"))
    bars(panels[2], "gradients reduced, GB", reduced, "%.1f")
    pictures.save(picture, "three_ways", CAPTION)


if __name__ == "__main__":
    draw()
