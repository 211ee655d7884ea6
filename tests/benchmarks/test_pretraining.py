# SPDX-License-Identifier: Apache-2.0
"""Which runs the benchmark of pre-training makes, and what it concludes from them."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.lib import records, tuning
from benchmarks.training import pretraining, pretraining_plan, tables
from benchmarks.training.pretraining_plan import BUDGETS, METHODS, Point, Record

BUDGET = BUDGETS["demo"]
RATIOS = BUDGET.ratios
# Exponents at which the made-up losses are least: inside, below and above the grids.
LEAST = dict(zip(METHODS, itertools.cycle((-3, -8, 2)), strict=False))


def test_a_grid_grows_until_its_best_is_inside() -> None:
    start = [-2, -1, 0]
    assert tuning.wanted({}, start) == start
    assert tuning.wanted({-1: 3.0}, start) == [-2, 0]
    assert tuning.wanted({-2: 2.0, -1: 1.0, 0: 2.0}, start) == []
    assert tuning.wanted({-2: 1.0, -1: 2.0, 0: 3.0}, start) == [-3]
    assert tuning.wanted({-2: 3.0, -1: 2.0, 0: 1.0}, start) == [1]
    assert tuning.wanted({-2: 1.0, -1: 2.0, 0: 3.0, -3: 1.5}, start) == []


def test_runs_that_diverged_are_the_worst() -> None:
    assert tuning.argbest({-1: None, 0: 9.0, 1: math.nan}) == 0
    assert tuning.wanted({-2: None, -1: None, 0: None}, [-2, -1, 0]) == [-3]
    assert tuning.argbest({-1: 2.0, 0: 2.0}) == -1


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Record:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "machine", dict)
    return Record(BUDGET, seeds=3)


def made_up(point: Point) -> dict[str, Any]:
    """A run whose loss is a parabola in the exponent, better at a quarter."""
    loss = 4 + 0.1 * (point.exponent - LEAST[point.method]) ** 2 - point.ratio
    return {
        **dataclasses.asdict(point),
        "validation_loss": loss + 0.01 * point.seed,
        "learning_rate": point.rate,
        "curve": [[250, 5.0]],
        **{name: 1 for name in ("parameters", "tokens")},
        **{name: 1 for name in ("parameter_bytes", "state_bytes")},
        "bf16_bytes": {"weights": 1, "states": 1},
    }


def fill(record: Record, count: int = 10_000) -> list[Point]:
    """Makes runs up, at most so many, and says which."""
    made: list[Point] = []
    while len(made) < count and (point := record.next(METHODS)):
        record.runs.get(record.key(point), lambda point=point: made_up(point))
        made.append(point)
    return made


def test_every_method_is_tuned_and_then_repeated(record: Record) -> None:
    made = fill(record)
    assert len(set(made)) == len(made)
    assert record.missing() == []
    for name, least in LEAST.items():
        assert record.best(name) == Point(name, 0.25, least)
        assert [p.seed for p in record.at_best(name) if record.found(p)] == [0, 1, 2]
        for ratio in set(RATIOS) & METHODS[name].first.keys():
            row = record.row(name, ratio)
            assert {least - 1, least, least + 1} <= row.keys()
            assert set(METHODS[name].start(ratio)) <= row.keys()
            assert sorted(row) == list(range(min(row), max(row) + 1))


def test_all_methods_progress_together(record: Record) -> None:
    made = fill(record, 5 * len(METHODS))
    for end in range(len(METHODS), len(made), len(METHODS)):
        counts = [sum(p.method == name for p in made[:end]) for name in METHODS]
        assert max(counts) == min(counts)
    assert all(p.seed == 0 for p in made)


def test_an_interrupted_series_goes_on(record: Record) -> None:
    first = fill(record, 7)
    again = Record(BUDGET, seeds=3)
    assert all(again.found(p) for p in first)
    assert again.next(METHODS) == record.next(METHODS)
    assert Record(BUDGET, 3).runs.found.keys() == {record.key(p) for p in first}


def test_other_budgets_are_other_runs(record: Record) -> None:
    fill(record, 3)
    other = Record(dataclasses.replace(BUDGET, batch=16), seeds=3)
    assert all(record.row(name, RATIOS[0]).keys() for name in list(METHODS)[:3])
    assert not any(other.row(name, RATIOS[0]) for name in METHODS)


def test_missing_names_what_is_not_there(record: Record) -> None:
    everything = record.missing()
    starts = 3 * sum(
        ratio in method.first for ratio in RATIOS for method in METHODS.values()
    )
    assert len(everything) == starts + 1
    assert "what grids then want" in everything[-1]
    made = fill(record, 1)
    assert str(made[0]) in everything
    assert str(made[0]) not in record.missing()
    fill(record)
    more = Record(BUDGET, seeds=4).missing()
    assert len(more) == len(METHODS)
    assert all("seed 3" in line for line in more)


def test_rows_go_from_the_best_up_and_tell_what_diverged(record: Record) -> None:
    fill(record, 8 * len(METHODS))
    early = pretraining.table(record)
    assert not all(row["tuned"] for row in early.values())
    fill(record)
    first = next(iter(METHODS))
    for number, point in enumerate(record.at_best(first)):
        record.found(point)["validation_loss"] = 2.0 + 0.01 * number
    found = pretraining.table(record)
    assert set(found) == set(METHODS)
    assert next(iter(found)) == first
    assert found[first]["losses"] == [2.0, 2.01, 2.02]
    record.found(record.at_best(first)[2])["validation_loss"] = None
    found = pretraining.table(record)
    assert (found[first]["diverged"], len(found[first]["losses"])) == (1, 2)
    json.dumps(found, allow_nan=False)
    shown = tables.pretraining({"control": "none", "rows": found}, {"methods": {}})
    assert f"| {first} | 7.43 ± 0.05 (1 diverged) |" in shown
    assert set(pretraining.planned(record, METHODS)) == set(record.runs.found)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_run_that_the_example_takes(name: str) -> None:
    """Settings check themselves."""
    for budget in BUDGETS.values():
        rank, dtype = budget.rank, budget.dtype
        run = METHODS[name].run(budget, Point(name, 0.25, -3))
        assert (run.clip == 0) == (name == "AdamW, no clipping")
        assert (run.learning_rate, run.params_dtype) == (0.00125, dtype)
        if run.optimizer.startswith("galore_adamw"):
            assert {f"rank={rank}", "scale=0.25"} <= set(run.options)
            assert run.matrix_rate == 1
        else:
            assert run.matrix_rate == (0 if name == pretraining_plan.CONTROL else 0.25)
        if run.adapter:
            assert (run.adapter_rank, run.adapter_alpha) == (rank, 32)


def test_bytes_are_counted_as_in_the_paper() -> None:
    tree = {
        "f32": jnp.ones((3, 5), jnp.float32),
        "bf16": jnp.ones(7, jnp.bfloat16),
        "int8": jnp.ones(11, jnp.int8),
        "count": jnp.int32(0),
    }
    assert pretraining.bf16_bytes(tree) == 2 * 15 + 2 * 7 + 11
    assert pretraining.finite(math.nan) is None
    assert pretraining.finite(np.inf) is None


def test_two_words_of_a_row_are_not_mixed_up(record: Record) -> None:
    """One method's name begins as another's does."""
    point = Point("AdamW, no clipping", 0.25, -3)
    record.runs.get(record.key(point), lambda: made_up(point))
    assert record.row("AdamW", 0.25) == {}
    assert record.next(["AdamW", "AdamW, no clipping"]).method == "AdamW"
