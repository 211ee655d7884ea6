# SPDX-License-Identifier: Apache-2.0
"""Trains a small LLaMA on real English text with AdamW and with GaLore, and compares.

Same initialisation, tokens and schedule; the learning rate of each was chosen on a
grid by `benchmarks/training/demo.py`. Prints a table and writes `out/demo.png`.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import matplotlib

import metrics
from settings import Settings
from train import Result, Trainer

RANK = 64  # a quarter of the width
GAP = 50
# AdamW's matrices learn at a sixteenth of the rate of everything else, the best of the
# grid. At a quarter, the difference that GaLore's usual `scale` makes, AdamW comes out
# worse on this run, and the comparison would flatter GaLore.
ADAMW = Settings(
    optimizer="adamw",
    learning_rate=0.02,
    matrix_rate=1 / 16,
    options=("weight_decay=0.01",),
)
GALORE = Settings(
    optimizer="galore_adamw",
    learning_rate=5e-3,
    options=(f"rank={RANK}", f"update_proj_gap={GAP}", "weight_decay=0.01"),
)
RUNS = {"AdamW": ADAMW, f"GaLore, rank {RANK}": GALORE}


def table(results: dict[str, Result]) -> str:
    """One row an optimizer, the first of them as the yardstick."""
    first = next(iter(results.values()))
    head = f"{'':16} {'val. perplexity':>15} {'tokens/s':>9} {'optimizer state':>24}"
    lines = [head, "-" * len(head)]
    for name, result in results.items():
        share = f"({result.state_bytes / first.state_bytes:.0%})"
        size = f"{result.state_bytes:,} bytes {share:>6}"
        speed = f"{result.tokens_per_second:,.0f}"
        lines.append(f"{name:16} {result.perplexity:15.1f} {speed:>9} {size:>24}")
    return "\n".join(lines)


def picture(results: dict[str, Result], path: Path) -> None:
    """Loss against the step on the left, bytes of optimizer state on the right."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, sizes) = plt.subplots(
        1, 2, figsize=(9, 4), width_ratios=(2.4, 1), layout="constrained"
    )
    _draw_losses(losses, results)
    _draw_sizes(sizes, results)
    for axes in (losses, sizes):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_losses(axes: Any, results: dict[str, Result]) -> None:
    """Labels at the ends of the curves, the higher one above."""
    worst = max(results, key=lambda name: results[name].perplexity)
    for number, (name, result) in enumerate(results.items()):
        told = {"color": f"C{number}", "zorder": 3}
        steps, values = metrics.series(result.records, "validation_loss")
        axes.plot(*metrics.series(result.records, "loss"), f"C{number}", alpha=0.25)
        axes.plot(steps, values, "o-", **told, markersize=4)
        label = f"{name}\nperplexity {result.perplexity:.1f}"
        side = 22 if name == worst else -10
        axes.annotate(
            label, (steps[-1], values[-1]), (8, side), **told,
            textcoords="offset points", va="center", annotation_clip=False,
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="nats per token")
    title = "Loss on English prose: dots validation, faint training"
    axes.set_title(title, fontsize="medium")
    axes.margins(x=0.02, y=0.08)


def _draw_sizes(axes: Any, results: dict[str, Result]) -> None:
    sizes = [result.state_bytes / 1e6 for result in results.values()]
    colours = [f"C{number}" for number in range(len(sizes))]
    labels = [name.replace(", ", "\n") for name in results]
    bars = axes.bar(labels, sizes, color=colours, width=0.6)
    axes.bar_label(bars, [f"{x:.1f} MB\n{x / sizes[0]:.0%}" for x in sizes], padding=2)
    axes.set(ylabel="MB", ylim=(0, 1.2 * max(sizes)))
    axes.set_title("Optimizer state", fontsize="medium")


def compare(steps: int, seed: int, out: Path) -> dict[str, Result]:
    """Trains with each optimizer, prints the table and draws the curves."""
    results = {}
    for name, settings in RUNS.items():
        run = dataclasses.replace(
            settings, steps=steps, seed=seed, out=out / settings.optimizer
        )
        results[name] = Trainer(run, name=name).train()
    print(f"\n{table(results)}\n")
    picture(results, out / "demo.png")
    print(f"loss curves and bytes: {out / 'demo.png'}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=ADAMW.steps)
    parser.add_argument("--seed", type=int, default=ADAMW.seed)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    compare(arguments.steps, arguments.seed, arguments.out)


if __name__ == "__main__":
    main()
