# SPDX-License-Identifier: Apache-2.0
"""GaLore's Table 2 at the size that a machine allows: pre-training, method by method.

Every method gets the same model, initial weights, tokens in the same order, schedule
and held-out text, rank a quarter of the width (the paper's for its sizes), no weight
decay. Three rows have AdamW: with gradients clipped to a global norm of 1, as all
methods but one are here; without, which is the paper's baseline; and in eight bits.

Tuning, the same for all, with seed 0:
- the learning rate on 0.01 · 2^k, three values at first; a row whose best is at
  its edge grows on that side until the best is inside;
- each such row twice, with two ratios of the rate of the layers' matrices to that of
  embeddings, head and norms: a quarter, which is GaLore's published scale, and a
  sixteenth in small models, one in large ones. For GaLore the ratio is its `scale`, for
  the others the example's `matrix_rate`. With a single ratio the order of methods would
  be that of how well it suits each: what trains less of a matrix bears a larger rate.
Then all seeds, that of the tuning among them, at the best rate and ratio.

LoRA and ReLoRA have alpha 32 as in the paper, no dropout, and no full-rank warm-up;
ReLoRA has ten cycles, its rate rising over a tenth of each. Adafactor is that of
GaLore's script, without parameter scale, and with a first moment, decay 0.9, as the
paper says. The last row is a control, AdamW for embeddings, head and norms alone: what
it loses is all that training the layers' matrices can gain.

A row differs from GaLore's where the 95 % interval of the difference of their final
losses, seed by seed, excludes zero (`paired.py`); elsewhere no order is claimed. One
text is held out, for tuning and for the table: with a few rates a row that favours all
alike. Orders hold for this grid. Memory is counted as in the paper: weights and
optimizer state, two bytes an entry (what has eight bits: one).

    python -m benchmarks.training.pretraining [--model demo --steps 1500] [--list]
        [--minutes 60]          starts no run after that; the same command goes on
        [--methods GaLore LoRA] makes the runs of these only
    python -m benchmarks.training.pretraining --model 60m              on a GPU
    python -m benchmarks.training.pretraining --speed [--model 60m]   tokens/s, in turns

Tokens come from the example's cache (`$GALORE_OPTAX_CACHE`, by default
~/.cache/galore_optax). A machine without a network needs a copy of its folder
`<corpus>-<hash>-<vocabulary>`, written on one that has it by the first run of any model
with that vocabulary, at the same place.
"""

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.lib import records
from benchmarks.lib.subjects import timed
from benchmarks.training import runs, tables
from benchmarks.training.pretraining_plan import (
    BUDGETS,
    CONTROL,
    METHODS,
    Budget,
    Point,
    Record,
)

import metrics
from model import parameter_count
from steps import state_bytes
from train import open_text

BLOCKS = 3  # measured


class Speed:
    """One method, compiled, with the times of its blocks; methods take turns."""

    def __init__(self, name: str, budget: Budget):
        point = Point(name, 0.25, METHODS[name].first[0.25])
        run = METHODS[name].run(budget, point)
        self.program, self.block = run.program(), budget.gap
        self.state = self.program.init(self.program.init_params(0))
        self.update, _ = self.program.compiled(self.state)
        self.state_bytes = state_bytes(self.state.opt_state)
        self.seconds: list[float] = []

    def run(self, batches: Iterator[Any]) -> None:
        placed = [self.program.put(next(batches)) for _ in range(self.block)]
        seconds, self.state = timed(self._block, placed)
        self.seconds.append(seconds)

    def _block(self, batches: list[Any]) -> Any:
        for batch in batches:
            self.state, _ = self.update(self.state, batch)
        return self.state


def speeds(budget: Budget, names: Iterable[str]) -> dict[str, Any]:
    """Tokens/s of blocks of `gap` steps, so that each holds one refresh, in turns."""
    first = METHODS["AdamW"].run(budget, Point("AdamW", 0.25, -4))
    batches = open_text(dataclasses.replace(first, eval_batches=1)).train
    methods = {name: Speed(name, budget) for name in names}
    for number in range(BLOCKS + 1):
        for name, one in methods.items():
            one.run(batches)
            print(f"block {number}, {name}: {one.seconds[-1]:.2f} s", flush=True)
    tokens = budget.gap * budget.batch * budget.tokens
    return {
        name: {
            "tokens_per_second": tokens / statistics.median(one.seconds[1:]),
            "seconds_per_block": one.seconds[1:],  # the first compiles
            "state_bytes": one.state_bytes,
        }
        for name, one in methods.items()
    }


def bf16_bytes(tree: Any) -> int:
    """Bytes of the arrays, if every floating entry of more than two had two."""

    def size(leaf: jax.Array) -> int:
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.size * min(leaf.dtype.itemsize, 2) if floating else leaf.nbytes

    arrays = [leaf for leaf in jax.tree.leaves(tree) if leaf.ndim]
    return sum(map(size, arrays))


def finite(loss: float) -> float | None:
    """What JSON can hold of a loss: nothing of that of a run which diverged."""
    return loss if math.isfinite(loss) else None


def train(point: Point, budget: Budget) -> dict[str, Any]:
    """One run, and what is kept of it."""
    run = METHODS[point.method].run(budget, point)
    result = runs.train(run, str(point))
    steps, losses = metrics.series(result.records, "validation_loss")
    params, opt_state = result.state.params, result.state.opt_state
    memory = bf16_bytes(params), bf16_bytes(opt_state)
    found = {
        **dataclasses.asdict(point),
        "learning_rate": point.rate,
        "validation_loss": finite(losses[-1]),
        "curve": [[step, finite(x)] for step, x in zip(steps, losses, strict=True)],
        "tokens": run.steps * run.batch * run.tokens,
        "parameters": parameter_count(params),
        "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(params)),
        "state_bytes": result.state_bytes,
        "bf16_bytes": {"weights": memory[0], "states": memory[1], "total": sum(memory)},
    }
    jax.clear_caches()
    return found


def table(record: Record) -> dict[str, Any]:
    """Rows from the best mean loss up."""
    rows = {name: row(record, name) for name in METHODS if record.best(name)}
    order = sorted(rows, key=lambda name: statistics.mean(rows[name]["losses"]))
    return {name: rows[name] for name in order}


def row(record: Record, method: str) -> dict[str, Any]:
    """The runs of a method at its best rate and ratio, and its grid."""
    each = [run for point in record.at_best(method) if (run := record.found(point))]
    losses = [run["validation_loss"] for run in each if run["validation_loss"]]
    kept = ("learning_rate", "ratio", "parameters")
    kept += ("parameter_bytes", "state_bytes", "bf16_bytes", "tokens")
    grid = {
        f"matrices at {ratio:g}": {
            f"{Point(method, ratio, k).rate:g}": loss
            for k, loss in sorted(record.row(method, ratio).items())
        }
        for ratio in record.ratios
    }
    return {
        "losses": losses,
        "perplexities": [math.exp(loss) for loss in losses],
        "diverged": len(each) - len(losses),
        "tuned": record.is_tuned(method),
        **{name: each[0][name] for name in kept},
        "curves": [run["curve"] for run in each],
        "grid": grid,
    }


def parse() -> argparse.Namespace:
    parser = records.parser(__doc__)
    parser.add_argument("--model", default="demo", choices=BUDGETS)
    parser.add_argument("--steps", type=int, help="instead of the size's")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="start no run after so many")
    parser.add_argument("--list", action="store_true", help="of runs, and end")
    parser.add_argument("--speed", action="store_true", help="only tokens/s, in turns")
    return parser.parse_args()


def planned(record: Record, methods: Iterable[str]) -> list[str]:
    """Keys of the runs that there are, and of those that are wanted next."""
    return [
        record.key(point)
        for name in methods
        for point in (*record.tried(name), *record.wanted(name))
    ]


def main() -> None:
    arguments = parse()
    usual = BUDGETS[arguments.model]
    budget = dataclasses.replace(usual, steps=arguments.steps or usual.steps)
    name = arguments.model + ("" if budget == usual else f"_{budget.steps}")
    told: dict[str, Any] = {"budget": dataclasses.asdict(budget)}
    if arguments.speed:
        told["methods"] = speeds(budget, arguments.methods)
        skipped = [x for x in METHODS if x not in arguments.methods]
        records.write(f"training/pretraining_speed_{name}", told, missing=skipped)
        return
    record = Record(budget, arguments.seeds)
    if arguments.list:
        plan = dict.fromkeys(planned(record, arguments.methods))
        records.show_list(record.runs, plan)
        return
    end = time.monotonic() + 60 * (arguments.minutes or math.inf)
    while time.monotonic() < end and (point := record.next(arguments.methods)):
        record.runs.get(record.key(point), lambda point=point: train(point, budget))
    told |= {"seeds": arguments.seeds, "control": CONTROL, "rows": table(record)}
    print(tables.pretraining(told, {"methods": {}}))
    missing = record.missing()
    records.write(f"training/pretraining_{name}", told, missing, record.runs)


if __name__ == "__main__":
    main()
