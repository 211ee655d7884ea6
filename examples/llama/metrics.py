# SPDX-License-Identifier: Apache-2.0
"""What a run records: one JSON object a line, and the picture drawn from them."""

import json
from pathlib import Path
from typing import Any

import matplotlib

Record = dict[str, Any]


class Log:
    """A JSON-lines file, and TensorBoard if wanted, that a resumed run continues."""

    def __init__(self, folder: Path, resumed_at: int, tensorboard: bool):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self.records = [r for r in read(self.path) if r["step"] <= resumed_at]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        partial.rename(self.path)
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            purge = resumed_at + 1 if resumed_at else None
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, step: int, **values: Any) -> None:
        record = {"step": step, **values}
        self.records.append(record)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._board:
            self._board.close()


class Unwritten:
    """The log of a process that leaves writing to another."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, step: int, **values: Any) -> None:
        self.records.append({"step": step, **values})

    def close(self) -> None: ...


def read(path: Path) -> list[Record]:
    """The records of a file, without a last line that was cut off."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def series(records: list[Record], name: str) -> tuple[list[int], list[float]]:
    """The steps at which `name` was recorded, and its values."""
    found = [(r["step"], r[name]) for r in records if name in r]
    return [step for step, _ in found], [value for _, value in found]


def plot_projection(
    records: list[Record], path: Path, title: str, prefix: str = "projection/"
) -> None:
    """What `galore_optax.metrics` told, its names after `prefix`, against the step."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (energy, rank, counts) = plt.subplots(
        3, 1, figsize=(7, 7.5), sharex=True, height_ratios=(3, 2, 1),
        layout="constrained",
    )  # fmt: skip
    _by_leaf(energy, records, f"{prefix}energy", "all of them")
    _by_leaf(rank, records, f"{prefix}effective_rank", "the least")
    energy.set(ylabel="energy captured", ylim=(0, 1), title=title)
    energy.legend(fontsize="x-small", ncols=2)
    rank.set(ylabel="effective rank", ylim=(1, None))
    counts.plot(
        *series(records, f"{prefix}age"), "k.-", linewidth=1, label="age, steps"
    )
    counts.plot(*series(records, f"{prefix}refused"), "C3", label="bases refused")
    counts.set(xlabel="step")
    counts.legend(fontsize="x-small")
    for axes in (energy, rank, counts):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _by_leaf(axes: Any, records: list[Record], name: str, whole: str) -> None:
    """A line a leaf, and a black one of all."""
    found = {key for r in records for key in r if key.startswith(f"{name}/")}
    for key in sorted(found):
        label = key.removeprefix(f"{name}/")
        axes.plot(*series(records, key), label=label, linewidth=1)
    axes.plot(*series(records, name), "k", label=whole, linewidth=2)


def plot(runs: dict[str, list[Record]], path: Path, title: str) -> None:
    """Training loss, faint, and validation loss of several runs, against the step."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, (name, records) in enumerate(runs.items()):
        colour = f"C{number}"
        axes.plot(*series(records, "loss"), color=colour, alpha=0.3, linewidth=0.8)
        perplexities = series(records, "perplexity")[1]
        label = f"{name}: perplexity {perplexities[-1]:.1f}" if perplexities else name
        points = series(records, "validation_loss")
        axes.plot(*points, "o-", color=colour, label=label, markersize=4)
    axes.set(xlabel="step", ylabel="cross-entropy, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
