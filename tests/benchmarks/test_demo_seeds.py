# SPDX-License-Identifier: Apache-2.0
"""How the demo's learning rates are chosen, and that it has those on record."""

import dataclasses
import math
from typing import Any

from benchmarks.lib import report
from benchmarks.training import demo_seeds

import demo


def test_a_grid_grows_until_its_best_is_inside() -> None:
    def loss(name: str, settings: Any, rate: float, seed: int) -> float:
        assert (settings, seed) == (demo_seeds.SETTINGS[name], 0)
        return abs(math.log2(rate / 0.04))

    for name in demo_seeds.SETTINGS:
        found = demo_seeds.tuned(name, loss)
        assert min(found, key=found.__getitem__) == 0.04
        assert list(found)[-2:] == [0.04, 0.08]


def test_the_demo_has_the_best_rates_on_record() -> None:
    found = report.load("training/demo_seeds")
    best = found["learning_rates"]
    adamw = next(
        name
        for name, settings in demo_seeds.ADAMW.items()
        if settings.matrix_rate == found["matrix_rate_of_adamw"]
    )
    told = {"learning_rate": best[adamw]}
    assert dataclasses.replace(demo_seeds.ADAMW[adamw], **told) == demo.ADAMW
    assert demo.GALORE.learning_rate == best["GaLore"]
