# SPDX-License-Identifier: Apache-2.0
"""What is run, when a difference counts, and that a lane is its seed alone."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from benchmarks.lib import common, paired, pictures
from benchmarks.training import ablations, vmapped
from benchmarks.training.vmapped import NEVER, Recipe, Setting

import data
from model import Config

TINY = Config(vocab=64, width=16, hidden=24, layers=2, heads=2, max_tokens=16)
WIDE = dataclasses.replace(TINY, width=256, hidden=344)
RECIPE = Recipe(TINY, steps=4, seeds=2, batch=4, tokens=16, eval_batches=2)
SETTING = Setting(rank=4, gap=2)  # refreshes at steps 0 and 2


def corpus() -> data.Corpus:
    stream = np.random.default_rng(0).integers(0, 64, 2000).astype(np.uint16)
    return data.Corpus(stream, stream[:300], None)  # type: ignore[arg-type]


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
    assert "beyond the spread" in str(found)
    reverse = paired.difference(base, [x + 0.1 for x in base])
    assert reverse.high < 0
    assert not paired.difference(base, base).beyond_seeds


def test_one_seed_has_no_spread() -> None:
    with pytest.raises(ValueError, match="1 and 1 losses: a spread takes"):
        paired.difference([4.0], [4.1])
    with pytest.raises(ValueError, match="3 and 2 losses"):
        paired.difference([4.0, 4.1, 4.2], [4.1, 4.0])


def test_planned_settings() -> None:
    found = ablations.studies(128)
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
    base = ablations.base(128)
    for study, settings in found.items():
        assert base in settings.values(), study
    for study in set(found) - {ablations.GRID}:
        assert next(iter(found[study].values())) == base
    planned = ablations.unique(found)
    assert len(planned) == len(set(planned)) == 34
    assert len({ablations.key(RECIPE, setting) for setting in planned}) == 34


def test_settings_of_one_program_are_run_one_after_the_other() -> None:
    planned = ablations.unique(ablations.studies(128))
    programs = [dataclasses.replace(setting, gap=1) for setting in planned]
    changes = sum(one != other for one, other in itertools.pairwise(programs))
    assert changes + 1 == len(set(programs)) == 21


@pytest.mark.parametrize("study", list(ablations.studies(256))[1:])
def test_every_setting_has_a_state_of_its_own(study: str) -> None:
    wide = dataclasses.replace(RECIPE, config=WIDE)  # or no moment is worth coding
    params = jax.eval_shape(lambda: vmapped.program(wide, SETTING, 1).init_params(0))
    rate = optax.constant_schedule(1e-3)
    found = []
    for setting in ablations.studies(256)[study].values():
        tx = setting.transformation(rate, 10, 0)
        found.append(str(jax.eval_shape(tx.init, params)))
    # These change how bases are found, when, or only how far steps go.
    alike = {"subspace": 1, "stagger": 1, "learning rate": 2}
    assert len(set(found)) == alike.get(study, len(found))


def row(rank: int, gap: Any, loss: float) -> dict[str, Any]:
    losses = [loss + 0.5, loss + 0.001, loss - 0.3]
    return {"rank": rank, "gap": gap, "losses": losses}


def test_claims_of_figure_5() -> None:
    shape = {10: 0.10, 50: 0.0, 200: 0.02, "never": 0.2}
    table = [row(8, gap, 4 + more) for gap, more in shape.items()]
    table += [row(16, gap, 4 - more) for gap, more in shape.items()]
    table += [row(16, 1, 4.5)]
    table += [row(32, 10, 4.0)]  # the rest has still to be run
    found = ablations.claims(table)
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


@pytest.mark.slow
def test_a_lane_is_its_seed_alone() -> None:
    many = vmapped.lanes(RECIPE, SETTING)
    programs = [vmapped.program(RECIPE, SETTING, 2, seed) for seed in range(2)]
    alone = [one.init(one.init_params(seed)) for seed, one in enumerate(programs)]
    single = jax.jit(programs[0].update)  # seeds differ in their states alone
    states, gap = many.init(jnp.arange(2)), jnp.int32(SETTING.gap)
    starts = jax.tree.map(np.array, states.params)
    for seed in range(2):
        assert distance(of_lane(starts, seed), alone[seed].params) < 1e-6
        keys = states.opt_state[1].key[seed], alone[seed].opt_state[1].key
        np.testing.assert_array_equal(*keys)
    batches = vmapped.Batches(RECIPE, corpus())
    streams = [corpus().batches(RECIPE.tokens, RECIPE.batch, i) for i in range(2)]
    for _ in range(RECIPE.steps):
        states, _ = many.update(states, next(batches), gap)
        alone = [
            single(state, next(stream)[None])[0]
            for state, stream in zip(alone, streams, strict=True)
        ]
    moved = jax.tree.map(np.subtract, states.params, starts)
    for seed in range(2):
        start = of_lane(starts, seed)
        expected = jax.tree.map(np.subtract, alone[seed].params, start)
        assert distance(of_lane(moved, seed), expected) < TOLERANCE
        assert distance(of_lane(moved, 1 - seed), expected) > 0.5


def of_lane(tree: Any, seed: int) -> Any:
    return jax.tree.map(lambda x: x[seed], tree)


# Gradients agree to about 1e-6 of their typical entry. Adam divides each by its own
# size, so an entry of size x moves by min(2, 1e-6 / x) more or less: over entries with
# a density about 1 at zero that is sqrt(8 * 1e-6) of a step in the mean square.
TOLERANCE = 3e-3


def distance(one: Any, other: Any) -> float:
    difference = jax.tree.map(np.subtract, one, other)
    return float(optax.tree.norm(difference) / optax.tree.norm(other))


@pytest.mark.slow
def test_the_gap_of_a_run_is_its_own_though_the_program_is_shared() -> None:
    assert vmapped.lanes(RECIPE, Setting(4, gap=1)) is vmapped.lanes(
        RECIPE, Setting(4, gap=NEVER)
    )
    found = {gap: last_refresh(gap) for gap in (1, 2, NEVER)}
    assert found == {1: 3, 2: 2, NEVER: 0}


def last_refresh(gap: int) -> int:
    many = vmapped.lanes(RECIPE, SETTING)
    states, batches = many.init(jnp.arange(2)), vmapped.Batches(RECIPE, corpus())
    for _ in range(4):
        states, _ = many.update(states, next(batches), jnp.int32(gap))
    (found,) = set(np.asarray(states.opt_state[1].refresh.last).ravel().tolist())
    return found


def test_a_run_is_evaluated_by_seed() -> None:
    many = vmapped.lanes(RECIPE, SETTING)
    states = many.init(jnp.arange(2))
    losses = vmapped.evaluate(RECIPE, many, states, corpus())
    loss = jax.jit(vmapped.lane(RECIPE, SETTING).loss)
    for seed in range(2):
        sums = [
            loss(of_lane(states.params, seed), batch)
            for batch in corpus().validation_batches(16, 4, RECIPE.eval_batches)
        ]
        expected = sum(float(s) for s, _ in sums) / sum(int(n) for _, n in sums)
        assert losses[seed] == pytest.approx(expected, rel=1e-5)
    assert losses[0] != losses[1]


def test_a_run_says_what_it_took() -> None:
    found = vmapped.train(RECIPE, SETTING, corpus())
    # Random tokens: chance is the best there is, and four steps cannot be far from it.
    np.testing.assert_allclose(found["losses"], np.log(64), atol=0.2)
    state = jax.eval_shape(vmapped.lane(RECIPE, SETTING).init, jnp.int32(0)).opt_state
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert found["state_bytes_a_seed"] == size
    assert found["seconds"] > RECIPE.steps * found["seconds_a_step"] / 2


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The script with made-up losses; the names of the runs that it makes."""
    made: list[str] = []

    def train(recipe: Recipe, setting: Setting, corpus: Any) -> dict[str, Any]:
        made.append(str(setting))
        losses = np.random.default_rng(len(made)).normal(4, 0.01, recipe.seeds)
        return {"losses": losses.tolist(), "state_bytes_a_seed": 1, "seconds": 0.0}

    timing = {"vmapped": 1.0, "one_after_the_other": 2.0, "ratio": 0.5}
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(pictures, "IMAGES", tmp_path / "docs" / "images")
    monkeypatch.setattr(ablations, "train", train)
    monkeypatch.setattr(ablations, "seconds_a_step", lambda *_: timing)
    monkeypatch.setattr(data, "load", lambda *_: None)
    return made


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["ablations.py", *arguments])
    ablations.main()


def written() -> dict[str, Any]:
    return json.loads((common.RESULTS / "training" / "ablations.json").read_text())


def test_a_benchmark_that_was_stopped_goes_on(
    benchmark: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    start(monkeypatch, "--minutes", "0")
    assert not benchmark
    assert not written()["complete"]
    assert len(written()["missing"]) == 35
    assert not pictures.IMAGES.exists()
    start(monkeypatch)
    assert len(benchmark) == 34
    assert written()["complete"]
    assert (pictures.IMAGES / "ablations.png").exists()
    start(monkeypatch)
    assert len(benchmark) == 34
    start(monkeypatch, "--list")
    assert capsys.readouterr().out.count("on record") == 35
    start(monkeypatch, "--list", "--steps", "7")
    assert capsys.readouterr().out.count("to be run") == 35


def test_one_seed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        start(monkeypatch, "--seeds", "1")
