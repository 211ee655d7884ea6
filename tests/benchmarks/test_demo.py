# SPDX-License-Identifier: Apache-2.0
"""How the demo's learning rates are chosen, and that it has those on record."""

import dataclasses
import math
from typing import Any

from benchmarks.lib import records
from benchmarks.training import demo as benchmark

import demo


def test_a_grid_grows_until_its_best_is_inside() -> None:
    def loss(name: str, settings: Any, rate: float, seed: int) -> float:
        assert (settings, seed) == (benchmark.SETTINGS[name], 0)
        return abs(math.log2(rate / 0.04))

    for name in benchmark.SETTINGS:
        found = benchmark.grid_of(name, loss)
        assert min(found, key=found.__getitem__) == 0.04
        assert list(found)[-2:] == [0.04, 0.08]


def test_seeds_run_at_the_best_rates() -> None:
    made: set[tuple[str, float, int]] = set()

    def loss(name: str, settings: Any, rate: float, seed: int) -> float:
        made.add((name, rate, seed))
        ratio = 0.1 if settings.matrix_rate == 0.25 else 0.0
        return abs(math.log2(rate / 0.01)) + ratio + seed

    found = benchmark.compared(loss)
    assert found["learning_rates"] == dict.fromkeys(benchmark.SETTINGS, 0.01)
    assert found["matrix_rate_of_adamw"] == 1 / 16
    assert found["final_validation_loss"]["AdamW"] == [0.0, 1.0, 2.0]
    assert {seed for name, _, seed in made if name == "GaLore svd"} == {0, 1, 2}


def test_the_demo_has_the_best_rates_on_record() -> None:
    found = records.load("training/demo_seeds")
    best = found["learning_rates"]
    adamw = next(
        name
        for name, settings in benchmark.ADAMW.items()
        if settings.matrix_rate == found["matrix_rate_of_adamw"]
    )
    told = {"learning_rate": best[adamw]}
    assert dataclasses.replace(benchmark.ADAMW[adamw], **told) == demo.ADAMW
    assert demo.GALORE.learning_rate == best["GaLore"]


def test_the_larger_runs_are_settings_that_the_example_takes() -> None:
    for choices in benchmark.LARGER.values():
        for choice in choices:
            run = benchmark.larger_settings("9m", choice, 60)
            assert run.learning_rate == choice["learning_rate"]
            assert ("rank=32" in run.options) == run.optimizer.startswith("galore")
