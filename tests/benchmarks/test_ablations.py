# SPDX-License-Identifier: Apache-2.0
"""What is run, when a difference counts, and what is concluded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.lib import paired, pictures, records
from benchmarks.training import ablations
from benchmarks.training.ablations import NEVER


def test_interval_is_that_of_the_paired_t_test() -> None:
    one, other = [4.71, 4.73, 4.76, 4.70], [4.70, 4.74, 4.72, 4.69]
    found = paired.difference(one, other)
    theirs = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high))
    assert found.mean == pytest.approx(np.mean(one) - np.mean(other))
    assert not found.beyond_seeds


def test_a_difference_that_every_seed_shows_is_beyond_them() -> None:
    base = [4.2, 4.9, 4.5]  # the seeds lie further apart than the settings
    found = paired.difference([4.2 + 0.10, 4.9 + 0.11, 4.5 + 0.09], base)
    assert found.beyond_seeds
    reverse = paired.difference(base, [x + 0.1 for x in base])
    assert reverse.high < 0
    assert not paired.difference(base, base).beyond_seeds


def test_one_seed_has_no_spread() -> None:
    with pytest.raises(ValueError, match="1 and 1 losses: a spread takes"):
        paired.difference([4.0], [4.1])
    with pytest.raises(ValueError, match="3 and 2 losses"):
        paired.difference([4.0, 4.1, 4.2], [4.1, 4.0])


def test_planned_settings() -> None:
    found = ablations.STUDIES
    ranks = {setting.rank for setting in found[ablations.GRID].values()}
    gaps = {setting.gap for setting in found[ablations.GRID].values()}
    assert ranks == {8, 16, 32, 64}
    assert gaps == {1, 10, 50, 200, NEVER}
    sizes = {study: len(settings) for study, settings in found.items()}
    assert sizes == {
        ablations.GRID: 17,
        "learning rate": 3,
        "subspace": 5,
        "proj_type": 5,
        "stagger": 2,
        "projector_dtype": 4,
        "moments": 4,
    }
    base = ablations.USUAL
    for study, settings in found.items():
        assert base in settings.values(), study
    for study in set(found) - {ablations.GRID}:
        assert next(iter(found[study].values())) == base
    planned = ablations.planned()
    assert len(planned) == len(set(planned)) == 34
    assert len(set(map(ablations.key, planned))) == 34
    assert (
        set(map(ablations.key, planned))
        <= records.Runs("training/ablations").found.keys()
    )


def test_every_setting_is_a_run_that_the_example_takes() -> None:
    """Settings check themselves; no two are the same run."""
    found = {str(setting): setting.run(1) for setting in ablations.planned()}
    runs = {(x.optimizer, x.options, x.learning_rate) for x in found.values()}
    assert len(runs) == len(found) == 34
    assert {(x.seed, x.eval_every, x.steps) for x in found.values()} == {(1, 300, 300)}
    half = found["rank=64, gap=50, rate x 0.5"]
    assert half.learning_rate == 0.01
    assert "rank=64" in half.options
    for setting in ablations.planned():
        if setting.options and setting.gap == 50:
            name, value = setting.options[0]
            assert f"{name}={value}" in setting.run(0).options


def row(rank: int, gap: Any, loss: float) -> dict[str, Any]:
    losses = [loss + 0.5, loss + 0.001, loss - 0.3]
    return {"rank": rank, "gap": gap, "losses": losses}


def test_extremes_are_compared_with_the_best_of_the_others() -> None:
    shape = {10: 0.10, 50: 0.0, 200: 0.02, "never": 0.2}
    table = [row(8, gap, 4 + more) for gap, more in shape.items()]
    table += [row(16, gap, 4 - more) for gap, more in shape.items()]
    table += [row(16, 1, 4.5)]
    table += [row(32, 10, 4.0)]  # the rest has still to be run
    found = ablations.figure_5(table)
    assert list(found) == ["8", "16"]
    assert found["8"]["best_gap"] == 50
    assert found["8"]["too_rare"]["best_other"] == 50
    assert found["8"]["too_rare"]["low"] > 0
    assert found["8"]["too_frequent"]["mean"] == pytest.approx(0.1)
    assert found["16"]["best_gap"] == "never"
    assert found["16"]["too_rare"]["best_other"] == 10
    assert found["16"]["too_rare"]["high"] < 0
    assert found["16"]["too_frequent"]["gap"] == 1
    assert found["16"]["too_frequent"]["best_other"] == "never"
    assert found["16"]["too_frequent"]["low"] > 0


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The script with made-up losses; the names of the runs that it makes."""
    made: list[str] = []

    def train(setting: ablations.Setting) -> dict[str, Any]:
        made.append(str(setting))
        losses = np.random.default_rng(len(made)).normal(4, 0.01, 3)
        return {"losses": losses.tolist(), "state_bytes_a_seed": 1}

    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(pictures, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(ablations, "train", train)
    return made


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["ablations.py", *arguments])
    ablations.main()


def test_a_benchmark_that_was_stopped_goes_on(
    benchmark: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def written() -> dict[str, Any]:
        path = records.RESULTS / "training" / "ablations.json"
        return json.loads(path.read_text())

    start(monkeypatch, "--minutes", "0")
    assert not benchmark
    assert len(written()["missing"]) == 34
    assert not pictures.IMAGES.exists()
    start(monkeypatch)
    assert len(benchmark) == 34
    assert written()["complete"]
    assert (pictures.IMAGES / "ablations.png").exists()
    start(monkeypatch)
    assert len(benchmark) == 34
