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

Two neighbours in the table are told apart where the 95 % interval of the difference of
their final losses, seed by seed, excludes zero and no run diverged (`paired.py`);
elsewhere no order is claimed. One text is held out, for tuning and for the table: with
a few rates a row that favours all alike. Orders hold for this grid. Memory is counted
as in the paper: weights and optimizer state, two bytes an entry (what has eight bits:
one).

    python -m benchmarks.training.pretraining [--model demo --steps 1500] [--list]
        [--minutes 60]          starts no run after that; the same command goes on
        [--methods GaLore LoRA] [--ratios 0.25] makes the runs of these only
    python -m benchmarks.training.pretraining --model 60m              on a GPU
    python -m benchmarks.training.pretraining --speed [--model 60m]   tokens/s, in turns

Tokens come from the example's cache (`$GALORE_OPTAX_CACHE`, by default
~/.cache/galore_optax). A machine without a network needs a copy of its folder
`<corpus>-<hash>-<vocabulary>`, written on one that has it by the first run of any model
with that vocabulary, at the same place.
"""

import argparse
import dataclasses
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.lib import common, paired
from benchmarks.training import pretraining_speed
from benchmarks.training.pretraining_plan import (
    CONTROL,
    DEFAULT,
    METHODS,
    SIZES,
    Budget,
    Point,
    Record,
)

import metrics
from data import PAD
from model import parameter_count
from train import Trainer


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
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(dataclasses.replace(run, out=Path(folder)), name=point.method)
        result = trainer.train()
    steps, losses = metrics.series(result.records, "validation_loss")
    print(f"{point}: validation loss {losses[-1]:.4f}", flush=True)
    params, opt_state = result.state.params, result.state.opt_state
    memory = bf16_bytes(params), bf16_bytes(opt_state)
    found = {
        **dataclasses.asdict(point),
        "learning_rate": point.rate,
        "validation_loss": finite(losses[-1]),
        "curve": [[step, finite(x)] for step, x in zip(steps, losses, strict=True)],
        "tokens": run.steps * run.batch * run.tokens,
        "held_out_tokens": sum(
            int((x[..., 1:] != PAD).sum()) for x in trainer.held_out
        ),
        "parameters": parameter_count(params),
        "parameter_bytes": sum(x.nbytes for x in jax.tree.leaves(params)),
        "state_bytes": result.state_bytes,
        "bf16_bytes": {"weights": memory[0], "states": memory[1], "total": sum(memory)},
    }
    jax.clear_caches()
    return found


def table(record: Record) -> dict[str, Any]:
    """Rows from the best mean loss up, and what seeds say of neighbours."""
    rows = {name: row(record, name) for name in METHODS if record.best(name)}
    order = sorted(rows, key=lambda name: statistics.mean(rows[name]["losses"]))
    pairs = [
        neighbours((one, rows[one]), (two, rows[two]))
        for one, two in itertools.pairwise(order)
    ]
    return {"rows": {name: rows[name] for name in order}, "neighbours": pairs}


def row(record: Record, method: str) -> dict[str, Any]:
    """The runs of a method at its best rate and ratio, and its grid."""
    runs = [run for point in record.at_best(method) if (run := record.found(point))]
    losses = [run["validation_loss"] for run in runs if run["validation_loss"]]
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
        "diverged": len(runs) - len(losses),
        "tuned": record.is_tuned(method),
        **{name: runs[0][name] for name in kept},
        "curves": [run["curve"] for run in runs],
        "grid": grid,
    }


Named = tuple[str, dict[str, Any]]


def neighbours(one: Named, two: Named) -> dict[str, Any]:
    """What seeds say of two rows; nothing if one lacks seeds, or some diverged."""
    pair = [one[0], two[0]]
    if one[1]["diverged"] or two[1]["diverged"]:
        return {"pair": pair, "separated": None, "reason": "runs that diverged"}
    counts = {len(row["losses"]) for _, row in (one, two)}
    if len(counts) > 1 or min(counts) < 2:
        return {"pair": pair, "separated": None, "reason": "fewer than two seeds"}
    found = paired.difference(two[1]["losses"], one[1]["losses"])
    return {
        "pair": pair,
        "difference": found.mean,
        "interval": [found.low, found.high],
        "separated": found.beyond_seeds,
    }


def show(found: dict[str, Any]) -> None:
    """The table in the paper's form, then its neighbours."""
    head = f"{'':20} {'perplexity':>17} {'memory':>10} {'lr':>9} {'matrices':>8}"
    print(f"\n{head}  seeds\n{'-' * (len(head) + 7)}")
    for name, line in found["rows"].items():
        values = line["perplexities"]
        spread = f"± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        memory = f"{line['bf16_bytes']['total'] / 1e6:,.1f} MB"
        cells = f"{statistics.mean(values):9.2f} {spread:>7} {memory:>10}"
        rates = f"{line['learning_rate']:9g} {line['ratio']:8g}"
        note = "" if line["tuned"] else "  (its grid is not finished)"
        note += f"  ({line['diverged']} diverged)" if line["diverged"] else ""
        print(f"{name:20} {cells} {rates}  {len(values)}{note}")
    for pair in found["neighbours"]:
        print(sentence(pair))


def sentence(pair: dict[str, Any]) -> str:
    one, two = pair["pair"]
    if pair["separated"] is None:
        return f"{one} and {two}: {pair['reason']}, no order is claimed"
    low, high = pair["interval"]
    numbers = f"difference {pair['difference']:.4f}, 95 % from {low:.4f} to {high:.4f}"
    if pair["separated"]:
        return f"{one} is better than {two}: {numbers}"
    return f"{one} and {two} are not told apart by these seeds: {numbers}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--corpus", default="core")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ratios", nargs="+", type=float, help="some of the size's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eval-batches", type=int, default=64)
    parser.add_argument("--minutes", type=float, help="start no run after so many")
    parser.add_argument("--list", action="store_true", help="of runs, and end")
    parser.add_argument("--speed", action="store_true", help="only tokens/s, in turns")
    parser.add_argument("--blocks", type=int, default=3, help="of --speed, measured")
    return parser.parse_args()


def budget_of(arguments: argparse.Namespace) -> Budget:
    """The size's budget, with what the command line says instead."""
    size = SIZES.get(arguments.model, DEFAULT)
    steps, batch, tokens, rank, gap, dtype, ratios = size
    return Budget(
        model=arguments.model,
        corpus=arguments.corpus,
        steps=arguments.steps or steps,
        batch=arguments.batch or batch,
        tokens=arguments.tokens or tokens,
        eval_batches=arguments.eval_batches,
        rank=rank or common.width(arguments.model) // 4,
        gap=gap,
        dtype=dtype,
        ratios=ratios,
    )


def ratios_of(arguments: argparse.Namespace, budget: Budget) -> tuple[float, ...]:
    """Those that are run now."""
    for ratio in arguments.ratios or ():
        if ratio not in budget.ratios:
            known = ", ".join(f"{x:g}" for x in budget.ratios)
            raise SystemExit(f"--ratios {ratio:g}: model {budget.model} has {known}.")
    return tuple(arguments.ratios or budget.ratios)


def show_list(record: Record, methods: Iterable[str]) -> None:
    for name in methods:
        points = [
            Point(name, ratio, k)
            for ratio in record.ratios
            for k in record.row(name, ratio)
        ]
        points += [p for p in record.at_best(name) if p.seed and record.found(p)]
        for point in points:
            print(f"done  {point}: {record.found(point)['validation_loss']}")
        for point in record.wanted(name):
            print(f"to do {point}")


def main() -> None:
    arguments = parse()
    budget = budget_of(arguments)
    if arguments.speed:
        found = pretraining_speed.measure(budget, arguments.methods, arguments.blocks)
        pretraining_speed.show(found)
        skipped = [x for x in METHODS if x not in arguments.methods]
        result = {"budget": dataclasses.asdict(budget), "methods": found}
        common.write(
            f"training/pretraining_speed_{budget.model}", result, missing=skipped
        )
        return
    record = Record(budget, ratios_of(arguments, budget), arguments.seeds)
    if arguments.list:
        show_list(record, arguments.methods)
        return
    end = time.monotonic() + 60 * (arguments.minutes or math.inf)
    while time.monotonic() < end and (point := record.next(arguments.methods)):
        record.runs.get(record.key(point), lambda point=point: train(point, budget))
    found = table(record)
    show(found)
    usual = SIZES.get(budget.model, DEFAULT)[0] == budget.steps
    name = f"training/pretraining_{budget.model}" + (
        "" if usual else f"_{budget.steps}"
    )
    told = {"budget": dataclasses.asdict(budget), "seeds": arguments.seeds}
    result = {**told, "control": CONTROL, **found}
    common.write(name, result, missing=record.missing(), runs=record.runs)


if __name__ == "__main__":
    main()
