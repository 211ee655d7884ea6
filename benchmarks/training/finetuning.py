# SPDX-License-Identifier: Apache-2.0
"""Does GaLore fine-tune as well as AdamW and LoRA? The paper's Table 4, smaller.

A learning rate for each method is searched on a ladder with one seed, on CoLA, by the
loss on rows held out of the training set; 363 such rows of RTE would choose by chance,
so all tasks have CoLA's rates. CoLA and RTE then run over seeds, SST-2 and film reviews
once; what the last epoch leaves is measured on GLUE's development sets. Rank 8 has the
rate of rank 4, at half the scale (16 / rank), and AdamW one for all leaves. Each run
is stored as soon as it ends, so an interrupted benchmark goes on where it stopped, and
several processes may share the work.

    python -m benchmarks.training.finetuning --glue-dir FOLDER [--tasks cola rte]
        [--minutes 60]  starts no run after that; the same command goes on
    python -m benchmarks.training.finetuning --list   what there is to run
    python -m benchmarks.training.finetuning --speed  seconds a step, side by side
"""

import argparse
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.lib import records, tuning
from benchmarks.training import finetuning_speed, tables

import tasks
from finetune import Trainer, load
from recipe import Recipe

# Rows of the table: method and rank. The rate of rank 4 is that of rank 8 too.
ROWS = {
    "AdamW": ("full", 4),
    "GaLore, rank 4": ("galore", 4),
    "LoRA, rank 4": ("lora", 4),
    "GaLore, rank 8": ("galore", 8),
    "LoRA, rank 8": ("lora", 8),
}
LADDER = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2)
START = {"full": 1e-4, "galore": 2e-4, "lora": 1e-3}
EPOCHS = {"cola": 2, "rte": 2, "reviews": 1, "sst2": 1}  # the paper's: 30
SHORTER = {"rte": {"tokens": 64}, "sst2": {"epoch_rows": 8_000}}  # for two cores
BATCH = 16  # in CoLA the paper has 32, and fifteen times the epochs
TUNED = "cola"
ONCE = ("reviews", "sst2")

Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one run is told."""

    task: str
    method: str
    rank: int
    rate: float
    seed: int
    epochs: int
    model: str

    @property
    def key(self) -> str:
        rank = "" if self.method == "full" else f" rank {self.rank}"
        shorter = "".join(f", {name} {x}" for name, x in self.shorter.items())
        return (
            f"{self.model}, {self.task}, {self.method}{rank}, lr {self.rate:g},"
            f" {self.epochs} epochs{shorter}, seed {self.seed}"
        )

    @property
    def shorter(self) -> dict[str, int]:
        """Where a run takes less of a row or of an epoch than the task has."""
        return SHORTER.get(self.task, {})

    def recipe(self, glue: Path | None, out: Path) -> Recipe:
        return Recipe(
            task=self.task,
            glue_dir=glue,
            model=self.model,
            method=self.method,
            rank=self.rank,
            learning_rate=self.rate,
            epochs=self.epochs,
            batch=BATCH,
            seed=self.seed,
            out=out,
            **self.shorter,
        )


def train(choice: Choice, glue: Path | None) -> Run:
    """One run; seconds of runs made at different times are not comparable."""
    print(choice.key, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        recipe = choice.recipe(glue, Path(folder))
        result = Trainer(recipe, *load(recipe)).train()
    last = result.records[-1]
    names = ("dev_metric", "dev_loss", "validation_metric", "validation_loss")
    return {name: last[name] for name in names} | {
        "steps": last["step"],
        "trained": result.trained,
        "state_bytes": result.state_bytes,
        "seconds_per_step": result.seconds_per_step,
        "records": result.records,
    }


def search(
    start: float, loss: Callable[[float], float | None]
) -> tuple[float | None, dict[str, float]]:
    """The rate of least loss, and all losses by rate.

    Tries `start` and its neighbours on the ladder, and goes on as long as the best is
    the first or last one tried. The rate is `None` if a loss is.
    """
    at, found = LADDER.index(start), {}
    while wanted := _on_ladder(tuning.wanted(found, range(at - 1, at + 2))):
        for place in wanted:
            if (value := loss(LADDER[place])) is None:
                return None, _by_rate(found)
            found[place] = value if math.isfinite(value) else math.inf
    return LADDER[tuning.argbest(found)], _by_rate(found)


def _on_ladder(places: list[int]) -> list[int]:
    return [place for place in places if 0 <= place < len(LADDER)]


def _by_rate(found: dict[int, float]) -> dict[str, float]:
    return {f"{LADDER[i]:g}": found[i] for i in sorted(found)}


class Table:
    """The rows of the table for one model, of runs on record or made now.

    What is not wanted, or not made in time, is listed in `missing` with its reason.
    """

    def __init__(
        self,
        runs: records.Runs,
        model: str,
        make: Callable[[Choice], Run],
        wanted: Callable[[str], str] = lambda task: "",  # why a task is not
        minutes: float = math.inf,
    ):
        self.runs, self.model, self.make, self.wanted = runs, model, make, wanted
        self.ends = time.monotonic() + 60 * minutes
        self.missing: list[str] = []
        self.rates: dict[str, float | None] = {}
        self.grid: dict[str, Any] = {}
        self.cells: dict[str, dict[str, list[Run]]] = {}

    def get(self, choice: Choice) -> Run | None:
        if choice.key not in self.runs.found and (reason := self._left_out(choice)):
            self.missing.append(f"{choice.key}: {reason}")
            return None
        return self.runs.get(choice.key, lambda: self.make(choice))

    def _left_out(self, choice: Choice) -> str:
        """Why a run is not made; empty if it is."""
        if unwanted := self.wanted(choice.task):
            return unwanted
        if time.monotonic() >= self.ends:
            return "no time left"
        elsewhere = self.runs.made_elsewhere(choice.key)
        return "another process makes it" if elsewhere else ""

    def _choice(self, task: str, row: str, rate: float, seed: int) -> Choice:
        method, rank = ROWS[row]
        return Choice(task, method, rank, rate, seed, EPOCHS[task], self.model)

    def run(self, seeds: int) -> None:
        for row in ("AdamW", "GaLore, rank 4", "LoRA, rank 4"):
            self.tune(row)
        for task in EPOCHS:
            for seed in range(1 if task in ONCE else seeds):
                self.fill(task, seed)

    def tune(self, row: str) -> None:
        """Searches the rate of a method, with seed 0."""

        def loss(rate: float) -> float | None:
            run = self.get(self._choice(TUNED, row, rate, 0))
            return run and run["validation_loss"]

        method = ROWS[row][0]
        self.rates[method], self.grid[method] = search(START[method], loss)

    def fill(self, task: str, seed: int) -> None:
        """One run of every row whose rate is known."""
        for row, (method, _) in ROWS.items():
            rate = self.rates[method]
            if rate is None:
                text = f"{task}, {row}, seed {seed}: no learning rate yet"
                self.missing.append(text)
            elif run := self.get(self._choice(task, row, rate, seed)):
                self.cells.setdefault(row, {}).setdefault(task, []).append(run)

    def result(self) -> dict[str, Any]:
        rows = {
            row: {task: summary(runs) for task, runs in by_task.items()}
            for row, by_task in self.cells.items()
        }
        return {
            "model": self.model,
            "epochs": EPOCHS,
            "shorter": SHORTER,
            "learning_rates": self.rates,
            "grid_validation_loss": self.grid,
            "rows": rows,
        }


def summary(runs: list[Run]) -> dict[str, Any]:
    """The scores of a cell over seeds, and what is the same for all."""
    scores = [run["dev_metric"] for run in runs]
    return {
        "dev_metric": scores,
        "mean": statistics.mean(scores),
        "dev_loss": [run["dev_loss"] for run in runs],
        "steps": runs[0]["steps"],
        "trained": runs[0]["trained"],
        "state_bytes": runs[0]["state_bytes"],
    }


def refusal(task: str, wanted: list[str], glue: Path | None) -> str:
    """Why a task is not run now; empty if it is."""
    if task not in wanted:
        return "not among --tasks"
    needs_files = bool(tasks.find(task).folder)
    return "--glue-dir was not given" if needs_files and glue is None else ""


def parse() -> argparse.Namespace:
    parser = records.parser(__doc__)
    parser.add_argument("--glue-dir", type=Path, help="for cola, rte and sst2")
    parser.add_argument("--tasks", nargs="+", default=list(EPOCHS), choices=EPOCHS)
    parser.add_argument("--model", default="minilm", choices=["minilm", "mpnet"])
    parser.add_argument("--seeds", type=int, default=3, help="of cola and rte")
    limit = {"type": float, "default": math.inf}
    parser.add_argument("--minutes", **limit, help="then no new run")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--speed", action="store_true", help="measure steps instead")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.speed:
        return finetuning_speed.measure(arguments.model)
    compiled = records.ROOT / "out" / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    glue, minutes = arguments.glue_dir, 0 if arguments.list else arguments.minutes
    table = Table(
        records.Runs("training/finetuning"),
        arguments.model,
        lambda choice: train(choice, glue),
        lambda task: refusal(task, arguments.tasks, glue),
        minutes,
    )
    table.run(arguments.seeds)
    result = table.result()
    print(tables.finetuning(result, {"over_adamw": {}}))
    suffix = "" if arguments.model == "minilm" else f"_{arguments.model}"
    name = f"training/finetuning{suffix}"
    records.write(name, result, table.missing, table.runs, quick=arguments.list)


if __name__ == "__main__":
    main()
