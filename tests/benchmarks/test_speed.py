# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the benchmarks of speed; nothing is timed here."""

import collections
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from benchmarks.lib import shapes as lib
from benchmarks.lib import subjects
from benchmarks.lib.shapes import Shapes, named
from benchmarks.lib.turns import Rival
from benchmarks.speed import (
    against_torch,
    family_step,
    floor,
    optimizer_step,
    rates,
    refresh_7b,
    rivals,
    step_trace,
    tables,
    trace_time,
)

SMALL = Shapes(width=32, hidden=80, layers=3, vocab=100)
BLOCKS = Shapes(width=32, hidden=80, layers=2, vocab=0)
TINY = Shapes(16, 24, 1, vocab=0)
RANK = 8
both = pytest.mark.parametrize("shapes", [SMALL, BLOCKS], ids=["whole", "blocks"])


def abstract(shapes: Shapes) -> Any:
    return lib.abstract(shapes.tree(), jnp.float32)


def size(tree: Any) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


@both
def test_the_shapes_are_counted(shapes: Shapes) -> None:
    projected = sum(m * n * count for (m, n), count in shapes.matrices().items())
    assert projected + shapes.others() == size(abstract(shapes))


@pytest.mark.parametrize(("name", "millions"), [("60M", 58.07), ("7b", 6738.42)])
def test_the_shapes_are_those_of_the_paper(name: str, millions: float) -> None:
    shapes = Shapes.load(name)
    projected = sum(m * n * count for (m, n), count in shapes.matrices().items())
    assert round((projected + shapes.others()) / 1e6, 2) == millions


@both
def test_the_floor_moves_each_array_of_the_step_once(shapes: Shapes) -> None:
    params = abstract(shapes)
    state = jax.eval_shape(galore_optax.galore(optax.adam(1.0), rank=RANK).init, params)
    moments = size((state.inner_state[0].mu, state.inner_state[0].nu))
    gradients = weights = size(params)
    moved = gradients + 2 * weights + size(state.projector) + 2 * moments
    assert rates.galore_work(shapes, RANK).bytes == 4 * moved


def test_the_floor_of_adamw_moves_each_array_once() -> None:
    state = jax.eval_shape(optax.adamw(1.0).init, abstract(SMALL))
    moments = size((state[0].mu, state[0].nu))
    moved = 3 * size(abstract(SMALL)) + 2 * moments
    assert rates.adamw_work(SMALL).bytes == 4 * moved


def test_the_floor_counts_a_product_to_project_and_one_to_lift() -> None:
    square, oblong = 2 * 32 * 32 * RANK, 2 * 32 * 80 * RANK
    assert rates.galore_work(SMALL, RANK).flops == 3 * 2 * (4 * square + 3 * oblong)


def test_the_floor_adds_products_and_copies() -> None:
    work = rates.Work((((2, 3, 5), 7), ((4, 4, 1), 1)), bytes=1000)
    found = rates.Rates({(2, 3, 5): 10.0, (4, 4, 1): 2.0}, bandwidth=50.0)
    assert found.floor(work) == pytest.approx(7 * 4 * 30 / 10 + 4 * 16 / 2 + 20)


def test_rates_are_those_of_the_shapes_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "DISPATCHED", 2e6)
    work = rates.galore_work(SMALL, RANK)
    found = rates.measure(work, copied=2**16)
    assert set(found.products) == {(32, 32, RANK), (32, 80, RANK)}
    assert 0 < found.floor(work) < 1


@both
def test_state_bytes_follow_the_formula(shapes: Shapes) -> None:
    params = abstract(shapes)
    state = jax.eval_shape(galore_optax.galore(optax.adam(1.0), rank=RANK).init, params)
    moments = state.inner_state[0].mu, state.inner_state[0].nu
    assert optimizer_step.formula_bytes(shapes, RANK) == 4 * size(
        (state.projector, moments)
    )


def test_a_step_in_place_is_the_step() -> None:
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), abstract(TINY))
    grads = jax.tree.map(lambda x: jnp.full(x.shape, 0.5), params)
    tx = optax.sgd(1e-2, momentum=0.9)
    updates, _ = tx.update(grads, tx.init(params), params)
    found = subjects.InPlace(tx, params).step(grads)
    expected = optax.apply_updates(params, updates)
    # The rounding of f32 is 1e-7 of a weight of about 0.1.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected
    )


def test_a_step_is_measured_at_the_smallest_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizer_step, "NAMES", (subjects.ADAMW, subjects.OURS))
    steps = optimizer_step.measure(TINY, 4, rounds=2)
    assert steps[subjects.OURS].keys() == steps[subjects.ADAMW].keys()
    assert tables.steps({"tiny": steps}).count("\n") == 3


@pytest.mark.slow
def test_the_family_is_measured_at_the_smallest_size() -> None:
    found = family_step.measure(TINY, 4, rounds=1)
    rows = found["rows"]
    assert rows.keys() >= {*family_step.transformations(4), family_step.DRAWN}
    assert rows[family_step.MINI]["state_bytes"] < rows[subjects.GALORE]["state_bytes"]
    assert tables.family_step(found).count("\n") == 1 + len(rows)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_floor_and_trace_are_measured_at_the_smallest_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "DISPATCHED", 2e6)
    point = floor.Point("model tiny", 16, TINY, 4)
    row = floor.measure(point, copied=2**16, steps=2)
    assert set(row["seconds"]) == set(floor.NAMES)
    assert row["ratio"][subjects.OURS] > 0
    assert "model tiny" in tables.floor({"points": [row]})
    traces = step_trace.run(TINY, 4, gap=2)
    assert {len(seconds) for seconds in traces.values()} == {6}


def test_a_models_refresh_is_the_sum_over_its_matrices() -> None:
    square, oblong = (4096, 4096), (4096, 11008)
    counts = Shapes.load("7b").matrices()
    seconds = {square: 2.0, oblong: 5.0}
    assert refresh_7b.total(seconds, counts) == 32 * (4 * 2.0 + 3 * 5.0)
    words = "128 x 2 s (4096 x 4096) + 96 x 5 s (4096 x 11008)"
    assert refresh_7b.in_words(seconds, counts) == words


def test_methods_are_compared_with_exact_svd() -> None:
    def get(method: str, shape: tuple[int, int]) -> dict[str, Any]:
        exact = method == refresh_7b.EXACT
        return {
            "refresh_seconds": 10.0 if exact else 0.5,
            "first_refresh_seconds": 10.0 if exact else 1.0,
            "captured_energy": 0.8 if exact else 0.6,
        }

    methods = refresh_7b.whole_model(SMALL, get)
    ours = methods[refresh_7b.DEFAULT]
    assert ours["refresh_seconds"] == 21 * 0.5
    assert ours["first_refresh_seconds"] == 21.0
    assert ours["times_faster_than_svd"] == 20.0
    assert set(ours["share_of_exact_energy"].values()) == {0.6 / 0.8}


def test_a_trace_leaves_out_its_first_gap() -> None:
    row = step_trace.summary([9.0, 9.0, 4.0, 1.0, 3.0, 1.0], gap=2)
    assert row["seconds"] == [4.0, 1.0, 3.0, 1.0]
    assert (row["first_seconds"], row["median_seconds"]) == (9.0, 2.0)
    assert row["largest_over_median"] == 2.0


def test_the_first_refresh_counts_apart() -> None:
    row = against_torch.summary({"steady": [1.0, 2.0, 9.0], "refresh": [7.0, 3.0]})
    assert row["steady_seconds"] == 2.0
    assert (row["first_refresh_seconds"], row["refresh_seconds"]) == (5.0, 1.0)


def test_starts_are_compared_one_by_one() -> None:
    def start(ours: float, theirs: float) -> dict[str, Any]:
        rows = {against_torch.OURS: ours, "theirs": theirs}
        return {k: {"steady_seconds": v, "versions": {}} for k, v in rows.items()}

    found = against_torch.over_starts([start(1, 2), start(4, 16), start(2, 6)])
    assert found["theirs"]["steady_seconds"] == 6
    assert found["theirs"]["steady_over_ours"] == [2, 4, 3]
    assert found[against_torch.OURS]["steady_over_ours"] == [1, 1, 1]


def test_torch_is_missed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (reason,) = against_torch.missing()
    assert "galore_torch" in reason
    assert "rivals" in reason


def test_rivals_project_the_same_matrices() -> None:
    leaves = named(SMALL.tree())
    projected = [shape for path, shape in leaves.items() if rivals.is_projected(path)]
    counted = collections.Counter(tuple(sorted(shape)) for shape in projected)
    assert counted == SMALL.matrices()
    assert sum(map(math.prod, leaves.values())) == size(abstract(SMALL))


def test_a_rival_answers_from_another_process() -> None:
    rival = Rival(collections.Counter, "abb")
    assert rival("most_common", 1) == [("b", 2)]
    with pytest.raises(AttributeError, match="no_such_method"):
        rival("no_such_method")
    rival.close()


def test_a_rival_that_cannot_start_says_why() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        Rival(int, "x")


def test_the_traced_model_has_290_leaves() -> None:
    assert len(named(trace_time.tree(trace_time.SHAPES))) == 290


def test_each_trace_begins_anew() -> None:
    traces = []

    def update(updates: jax.Array, state: tuple[()], params: jax.Array) -> object:
        traces.append(updates)
        return updates, state

    params = jnp.ones(3)
    for number in range(1, 3):
        made = optax.GradientTransformation(lambda params: (), update)
        row = trace_time.traced(lambda made=made: made, params)
        assert len(traces) == number
        assert row.keys() == {"init", "trace", "lower"}


def test_ratios_are_those_within_a_round() -> None:
    found = {
        "optax.adamw": {"trace": [1.0, 2.0, 4.0]},
        "optax.contrib.galore": {"trace": [2.0, 2.0, 2.0]},
        "galore_adamw": {"trace": [3.0, 4.0, 40.0]},
    }
    made = trace_time.summary(found)
    cell = made["galore_adamw"]["trace"]
    assert cell["seconds"] == 4.0
    assert cell["over"] == {"optax.adamw": 3.0, "optax.contrib.galore": 2.0}
    shown = tables.trace_time({"optimizers": made}).splitlines()
    assert shown[-1] == "| `galore_adamw` | trace | 4.000 | 3.00 | 2.00 |"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_that_is_traced_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_time, "RANK", 4)
    params = lib.weights(trace_time.tree(Shapes(16, 24, 1, vocab=32)))
    found = trace_time.measure(params, 2, 1)
    assert set(found) == set(trace_time.NAMES)
    assert all(len(x) == 2 for row in found.values() for x in row.values())
    assert "later un-jitted updates" not in found[subjects.THEIRS]
