# SPDX-License-Identifier: Apache-2.0
"""Draws `docs/images/pretraining_<model>.png` from the record of `pretraining.py`.

python -m benchmarks.training.draw_pretraining [--model 1m]
"""

import math
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes

from benchmarks.lib import pictures, records


def draw(found: dict[str, Any], model: str) -> None:
    rows = {
        name: row for name, row in found["rows"].items() if name != found["control"]
    }
    picture = pictures.figure(12, 5.2)
    left, right = picture.subplots(1, 2)
    tints = colormaps["tab10"](range(len(rows)))
    colours = dict(zip(rows, tints, strict=True))
    _cost(pictures.plain(left), rows, colours)
    _rates(pictures.plain(right), rows, colours)
    lines, names = right.get_legend_handles_labels()
    picture.legend(lines, names, loc="outside right center", frameon=False, fontsize=8)
    pictures.save(picture, f"pretraining_{model}", caption(found))


def _cost(axes: Axes, rows: dict[str, Any], colours: dict[str, Any]) -> None:
    """Perplexity over memory: a dot a seed, a line from least to most."""
    taken: list[float] = []
    for name, row in rows.items():
        memory, values = row["bf16_bytes"]["total"] / 1e6, row["perplexities"]
        place = memory * (1 + 0.008 * taken.count(memory))  # equal ones side by side
        taken.append(memory)
        axes.plot([place] * len(values), values, "o-", color=colours[name], ms=4)
    axes.set_xlabel("weights and optimizer state, two bytes an entry (MB)")
    axes.set_ylabel("validation perplexity")
    axes.set_title("At the best learning rate: dots are seeds", fontsize=10)


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
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    ticks = sorted({rate for line in axes.lines for rate in line.get_xdata()})
    axes.set_xticks(ticks, [f"{rate:.2g}" for rate in ticks], rotation=45)
    axes.set_xlabel("learning rate of the layers' matrices")
    axes.set_title("How it was tuned: one seed, the better ratio", fontsize=10)


def caption(found: dict[str, Any]) -> str:
    budget = found["budget"]
    return (
        f"LLaMA {budget['model']}, {budget['steps']} steps of {budget['batch']} x"
        f" {budget['tokens']} tokens of `{budget['corpus']}`, rank {budget['rank']},"
        f" a refresh every {budget['gap']} steps."
    )


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--model", default="1m")
    model = parser.parse_args().model
    draw(records.load(f"training/pretraining_{model}"), model)


if __name__ == "__main__":
    main()
