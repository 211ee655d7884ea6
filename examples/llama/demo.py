# SPDX-License-Identifier: Apache-2.0
"""Trains a small LLaMA on real English text with AdamW and with GaLore, and compares.

Same initialisation, tokens and schedule; the learning rate of each was chosen on a
grid by `benchmarks/demo_seeds.py`. Prints a table and writes `out/demo.png`.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib
import optax

import galore_optax

import data
from train import History, Run, cosine, train

RANK = 64  # a quarter of the width
GAP = 50


def adamw(
    peak: float = 2.5e-3, matrices: float = 0.25
) -> Callable[[int], optax.GradientTransformation]:
    """AdamW whose matrices learn at `matrices` times the rate of everything else.

    GaLore's `scale` makes the same difference; without it AdamW, at one rate for all,
    comes out far worse on this run, and the comparison would flatter GaLore.
    """
    return lambda steps: optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(cosine(peak, steps), weight_decay=0.01),
        optax.masked(optax.scale(matrices), _of_layers),
    )


def _of_layers(tree: Any) -> Any:
    def is_matrix(path: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return "layers" in name and "kernel" in name

    return jax.tree_util.tree_map_with_path(is_matrix, tree)


def galore(
    peak: float = 5e-3, subspace: galore_optax.subspace.Subspace | None = None
) -> Callable[[int], optax.GradientTransformation]:
    return lambda steps: galore_optax.chain(
        optax.clip_by_global_norm(1.0),
        galore_optax.galore(rank=RANK, update_proj_gap=GAP, subspace=subspace),
        optax.adamw(cosine(peak, steps), weight_decay=0.01),
    )


OPTIMIZERS = {"AdamW": adamw(), f"GaLore, rank {RANK}": galore()}


def table(histories: dict[str, History]) -> str:
    """One row an optimizer, the first of them as the yardstick."""
    first = next(iter(histories.values()))
    head = f"{'':16} {'val. perplexity':>15} {'tokens/s':>9} {'optimizer state':>24}"
    lines = [head, "-" * len(head)]
    for name, history in histories.items():
        share = f"({history.state_bytes / first.state_bytes:.0%})"
        size = f"{history.state_bytes:,} bytes {share:>6}"
        speed = f"{history.tokens_per_second:,.0f}"
        lines.append(f"{name:16} {history.perplexity:15.1f} {speed:>9} {size:>24}")
    return "\n".join(lines)


def plot(histories: dict[str, History], path: Path) -> None:
    """Training loss, faint, and validation loss, against the step."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, (name, history) in enumerate(histories.items()):
        colour = f"C{number}"
        steps = range(1, len(history.train_loss) + 1)
        axes.plot(steps, history.train_loss, color=colour, alpha=0.25, linewidth=0.8)
        label = f"{name}: perplexity {history.perplexity:.1f}"
        axes.plot(
            history.eval_steps, history.eval_loss, "o-", color=colour, label=label
        )
    axes.set(xlabel="step", ylabel="cross-entropy, nats per token")
    axes.set_title("Small LLaMA on English prose: validation (dots) and training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=Run.steps)
    parser.add_argument("--seed", type=int, default=Run.seed)
    parser.add_argument("--out", type=Path, default=Path("out"))
    arguments = parser.parse_args()
    run = Run(steps=arguments.steps, seed=arguments.seed)
    corpus = data.load(run.model.vocab)
    print(
        f"{len(corpus.train):,} training and {len(corpus.validation):,} held-out tokens"
    )
    histories = {
        name: train(corpus, make, run, name) for name, make in OPTIMIZERS.items()
    }
    print(f"\n{table(histories)}\n")
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(histories, arguments.out / "demo.png")
    record = {name: vars(history) for name, history in histories.items()}
    (arguments.out / "demo.json").write_text(json.dumps(record, indent=1))
    print(f"loss curves: {arguments.out / 'demo.png'}")


if __name__ == "__main__":
    main()
