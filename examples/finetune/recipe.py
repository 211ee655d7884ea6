# SPDX-License-Identifier: Apache-2.0
"""Everything that defines a fine-tuning run, and the optimizer that follows from it."""

from dataclasses import dataclass
from pathlib import Path

import optax
import tyro

from galore_optax import galore_adamw

import tasks
from weights import MODELS

METHODS = ("full", "galore", "lora")
PAPER_GAP, PAPER_EPOCHS = 500, 30


@dataclass(frozen=True)
class Recipe:
    """A fine-tuning run."""

    task: str = "reviews"
    """cola, rte or sst2, which need glue-dir; or reviews, which needs nothing."""
    glue_dir: Path | None = None
    """Folder that holds CoLA/train.tsv and so on."""
    model: str = "minilm"
    """minilm (22.6 million parameters) or mpnet (108.9)."""
    method: str = "galore"
    """full: AdamW on all parameters. galore: the same, with the linear maps of the
    layers projected. lora: adapters on those maps, and the head; the rest is frozen."""

    rank: int = 4
    alpha: float = 16.0
    """Updates of the projected or adapted maps are scaled by alpha / rank."""
    update_proj_gap: int = 0
    """Steps between projectors; 0: 500 for the paper's 30 epochs, in proportion."""

    learning_rate: float = 1e-4
    """At its peak."""
    epochs: int = 3
    batch: int = 0
    """Rows a step; 0: 32 for cola, 16 for the others, as in the paper."""
    tokens: int = 0
    """Longer rows are cut; 0: 32 for cola, 128 for rte, 64 for the others."""
    epoch_rows: int = 0
    """An epoch ends after so many rows, drawn anew for each; 0: after all."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; then it falls to 0."""

    seed: int = 0
    """Of the head, the adapters, the order of the rows and dropout."""
    out: Path = Path("out/finetune")
    """Folder of metrics.jsonl."""

    def __post_init__(self) -> None:
        tasks.find(self.task)
        for name, known in (("method", METHODS), ("model", tuple(MODELS))):
            found = getattr(self, name)
            if found not in known:
                raise ValueError(
                    f"unknown {name} {found!r}; known: {', '.join(known)}."
                )
        for name in ("rank", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("alpha", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        for name in ("batch", "tokens", "epoch_rows", "update_proj_gap"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} is negative; 0 is its default."
                )
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} must be a share of 1.")

    @property
    def rows(self) -> int:
        """Of a batch."""
        return self.batch or tasks.find(self.task).batch

    def steps_an_epoch(self, rows: int) -> int:
        """Batches of an epoch, where there are `rows` to train on."""
        return min(rows, self.epoch_rows or rows) // self.rows

    @property
    def longest(self) -> int:
        """Tokens of a row."""
        return self.tokens or tasks.find(self.task).tokens

    @property
    def gap(self) -> int:
        """Steps between projectors: by default as many projectors as in the paper."""
        shared = max(1, round(PAPER_GAP * self.epochs / PAPER_EPOCHS))
        return self.update_proj_gap or shared

    def schedule(self, steps: int) -> optax.Schedule:
        """Linear, up to the peak and down to 0."""
        peak, warmup = self.learning_rate, int(self.warmup * steps)
        up = optax.linear_schedule(0.0, peak, warmup)
        down = optax.linear_schedule(peak, 0.0, steps - warmup)
        return optax.join_schedules([up, down], [warmup])

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The optimizer of the parameters that are trained; no weight decay."""
        schedule = self.schedule(steps)
        if self.method != "galore":
            return optax.adamw(schedule, weight_decay=0.0)
        return galore_adamw(
            schedule,
            weight_decay=0.0,
            rank=self.rank,
            scale=self.alpha / self.rank,
            update_proj_gap=self.gap,
        )

    def trains(self, path: tuple[str, ...]) -> bool:
        """Whether the parameter at this path of the model is trained."""
        adapter = path[-1] in ("a", "b")
        return self.method != "lora" or "head" in path or adapter


def parse(arguments: list[str] | None = None) -> Recipe:
    """A recipe from the command line."""
    return tyro.cli(Recipe, args=arguments)
