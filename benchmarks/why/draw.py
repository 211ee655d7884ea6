# SPDX-License-Identifier: Apache-2.0
"""Draws four pictures in docs/images from the record of `why_it_works.py`.

python -m benchmarks.why.draw
"""

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.lib import pictures, records
from benchmarks.lib.pictures import BLUE, GREY, ORANGE

Found = dict[str, Any]


def draw(found: Found) -> None:
    draw_spectrum(found)
    draw_overlap(found)
    draw_energy(found)
    draw_update_rank(found)


def setting(found: Found) -> str:
    s = found["setting"]
    return (
        f"LLaMA of width {s['width']} and {s['layers']} layers, {s['steps']} steps of"
        f" {s['tokens_a_step']} tokens of English prose, GaLore with rank {s['rank']}"
        f" and a new subspace every {s['gap']} steps, one seed."
    )


def everything(by_matrix: dict[str, Any]) -> np.ndarray:
    """(stop, matrix) of a table by matrix, (stop, layer)."""
    return np.concatenate([np.array(rows) for rows in by_matrix.values()], axis=1)


def colours(count: int) -> np.ndarray:
    return colormaps[pictures.SEQUENCE](np.linspace(0.9, 0.0, count))


def band(axes: Axes, x: Any, table: np.ndarray, colour: str, label: str) -> None:
    """The median over matrices (stop, matrix), and where all of them lie."""
    axes.fill_between(x, table.min(1), table.max(1), color=colour, alpha=0.15, lw=0)
    middle = np.median(table, axis=1)
    axes.plot(x, middle, "o-", color=colour, label=label, markersize=4, lw=1.8)


def draw_spectrum(found: Found) -> None:
    spectrum, rank = found["spectrum"], found["setting"]["rank"]
    picture = pictures.figure(11, 6.2)
    panels = picture.subplots(2, 4, sharex=True, sharey=True).ravel()
    for axes, (name, rows) in zip(panels, spectrum["by_matrix"].items(), strict=False):
        pictures.plain(axes).set_title(name, fontsize=10)
        axes.axvline(rank, color="black", linestyle="--", linewidth=0.9)
        for step, row, colour in zip(
            found["steps"], rows, colours(len(rows)), strict=True
        ):
            label = f"step {step}"
            axes.plot(spectrum["index"], row, color=colour, linewidth=1.3, label=label)
    panels[0].set_yscale("log")
    panels[0].set_ylim(bottom=1e-5)
    panels[0].annotate(f" rank {rank}", (rank, 1.0), fontsize=8, va="top")
    panels[-1].axis("off")
    panels[-1].legend(
        *panels[0].get_legend_handles_labels(), loc="center", frameon=False, fontsize=9
    )
    for axes in panels[::4]:
        axes.set_ylabel("singular value / largest", fontsize=9)
    for axes in panels[3:7]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("index of the singular value", fontsize=9)
    caption = (
        "Singular values of the gradient of one batch, each line the median over the"
        f" layers. {setting(found)}"
    )
    pictures.save(picture, "spectrum", caption)


def draw_overlap(found: Found) -> None:
    overlap, steps = found["overlap"], found["steps"]
    picture = pictures.figure(11, 5.2)
    left, right = picture.subplots(1, 2, width_ratios=(1.25, 1))
    pictures.plain(left)
    series = {
        "the next batch, same weights": ("same_weights_next_batch", steps, GREY),
        "the refresh before": ("successive", steps[1:], BLUE),
    }
    for label, (name, x, colour) in series.items():
        band(left, x, everything(overlap[name]), colour, label)
    random = float(np.median(list(overlap["random"].values())))
    left.axhline(random, color="black", linestyle="--", linewidth=0.9)
    left.annotate("two random subspaces", (steps[-1], random), fontsize=8, va="bottom",
                  ha="right")  # fmt: skip
    left.set(ylim=(0, 1.02), xlabel="step of the refresh", xticks=steps)
    left.set_ylabel("overlap  |PᵀQ|² / rank  (1 = the same subspace)")
    left.set_title("New subspace against that of ...", fontsize=10)
    left.legend(frameon=False, fontsize=9)
    _pairs(picture, right, np.array(overlap["every_two"]), steps)
    caption = (
        "Left: lines are medians over the matrices, bands hold all of them. What two"
        " batches at the same weights do not share comes from the batch, not from"
        f" training. Right: medians over the matrices. {setting(found)}"
    )
    pictures.save(picture, "overlap", caption)


def _pairs(picture: Figure, axes: Axes, table: np.ndarray, steps: list[int]) -> None:
    image = axes.imshow(table, cmap=pictures.SEQUENCE, vmin=0, vmax=1)
    for (row, column), value in np.ndenumerate(table):
        colour = "white" if value < 0.6 else "black"
        text = f"{value:.2f}".removeprefix("0")
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=7)
    places = range(len(steps))
    axes.set_xticks(places, steps, fontsize=8, rotation=45)
    axes.set_yticks(places, steps, fontsize=8)
    axes.set(xlabel="refresh at step", ylabel="refresh at step")
    axes.set_title("Overlap of every two refreshes", fontsize=10)
    picture.colorbar(image, ax=axes, shrink=0.8, label="overlap")


def draw_energy(found: Found) -> None:
    picture = pictures.figure(11, 7.2)
    top, below = picture.subfigures(2, 1, height_ratios=(1.15, 1))
    axes, steps = pictures.plain(top.subplots()), found["steps"]
    names = list(found["energy"])
    for name, colour in zip(names, (BLUE, GREY, ORANGE), strict=True):
        table = everything(found["energy"][name])
        band(axes, steps[len(steps) - len(table) :], table, colour, name)
    random = float(np.median(list(found["overlap"]["random"].values())))
    axes.axhline(random, color="black", linestyle="--", linewidth=0.9)
    axes.annotate("random basis", (steps[-1], random), fontsize=8, va="bottom",
                  ha="right")  # fmt: skip
    axes.set(ylim=(0, 1.02), xlabel="step of the refresh", xticks=steps)
    axes.set_ylabel("captured energy  |PᵀG|² / |G|²")
    axes.legend(frameon=False, fontsize=9, ncols=3, loc="lower center")
    _heat_maps(below, found["energy"])
    caption = (
        "Above: share of the gradient's squared norm inside the subspace; lines are"
        " medians over the matrices, bands hold all of them. Below: means over the"
        f" refreshes, by layer and matrix. {setting(found)}"
    )
    pictures.save(picture, "energy", caption)


def _heat_maps(figure: Any, energy: dict[str, Any]) -> None:
    panels = figure.subplots(1, len(energy), sharey=True)
    for axes, (name, by_matrix) in zip(panels, energy.items(), strict=True):
        table = np.array([np.mean(rows, axis=0) for rows in by_matrix.values()]).T
        axes.imshow(table, cmap=pictures.SEQUENCE, vmin=0, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(table):
            colour, text = "white" if value < 0.6 else "black", f"{value:.2f}"
            axes.text(column, row, text, ha="center", va="center", color=colour,
                      fontsize=7)  # fmt: skip
        axes.set_xticks(range(table.shape[1]), list(by_matrix), fontsize=8, rotation=40)
        axes.set_yticks(range(len(table)))
        axes.set_title(name, fontsize=9)
    panels[0].set_ylabel("layer")


def draw_update_rank(found: Found) -> None:
    update, rank = found["update"], found["setting"]["rank"]
    names = list(update["GaLore"]["ranks"])
    picture = pictures.figure(11, 6.6)
    panels = picture.subplots(2, 2).ravel()
    _update_spectrum(pictures.plain(panels[0]), found)
    counts = range(1, len(found["steps"]))
    for axes, name in zip(panels[1:], names, strict=True):
        pictures.plain(axes).set_title(f"{name} of W - W₀", fontsize=10)
        for optimizer, colour in (("AdamW", GREY), ("GaLore", BLUE)):
            table = everything(update[optimizer]["ranks"][name])
            band(axes, counts, table, colour, optimizer)
        axes.set_ylim(bottom=0)
        axes.set_xticks(counts)
        axes.set_xlabel("subspaces trained in", fontsize=9)
        axes.set_ylabel(name, fontsize=9)
    for axes in panels[1:3]:  # a stable rank lies far below
        axes.axhline(rank, color="black", linestyle="--", linewidth=0.9)
        axes.annotate(f"rank of one subspace, {rank}", (counts[-1], rank), fontsize=8,
                      va="bottom", ha="right")  # fmt: skip
    panels[1].legend(frameon=False, fontsize=9, loc="lower right")
    pictures.save(picture, "update_rank", _update_caption(found))


def _update_spectrum(axes: Axes, found: Found) -> None:
    index, rank = found["spectrum"]["index"], found["setting"]["rank"]
    rows = found["update"]["GaLore"]["spectrum"]
    chosen = sorted({n for n in (1, 2, 4, 8, 16) if n <= len(rows)} | {len(rows)})
    for count, colour in zip(chosen, colours(len(chosen)), strict=True):
        plural = "s" if count > 1 else ""
        label = f"GaLore, {count} subspace{plural}"
        axes.plot(index, rows[count - 1], color=colour, label=label, lw=1.6)
    last = found["update"]["AdamW"]["spectrum"][-1]
    axes.plot(index, last, "--", color=GREY, label="AdamW, at the end", lw=1.6)
    axes.axvline(rank, color="black", linestyle="--", linewidth=0.9)
    axes.set_yscale("log")
    axes.set_ylim(bottom=1e-4)
    axes.set_xlabel("index of the singular value", fontsize=9)
    axes.set_ylabel("singular value / largest", fontsize=9)
    axes.set_title("Singular values of W - W₀", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _update_caption(found: Found) -> str:
    s = found["setting"]
    return (
        f"Numerical rank: singular values above {s['threshold']:.0%} of the largest;"
        " effective rank: exp of the entropy of s/Σs (Roy and Vetterli 2007); stable"
        " rank: |W - W₀|²_F / |W - W₀|²₂. Lines are medians over the matrices, bands"
        " hold all of them. After one subspace only weight decay is beyond index"
        f" {s['rank']}. {setting(found)} AdamW: the same data, at its own best rate."
    )


if __name__ == "__main__":
    draw(records.load("why/why_it_works"))
