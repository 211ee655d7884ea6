# SPDX-License-Identifier: Apache-2.0
"""What is traced, that it is traced anew, and how ratios are taken."""

import jax
import optax
import pytest

from benchmarks.speed import trace_time


def test_the_model_has_290_leaves() -> None:
    tree = trace_time.shapes(trace_time.LAYERS, **trace_time.SIZES)
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, tuple))
    assert len(leaves) == 290


def test_every_subject_has_a_state_that_its_name_promises() -> None:
    params = trace_time.make_params(1, trace_time.SIZES)
    states = {
        name: jax.eval_shape(make().init, params)
        for name, make in trace_time.transformations().items()
    }
    sizes = {
        name: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        for name, state in states.items()
    }
    assert sizes["galore_adamw8bit"] < sizes["galore_adamw"] < sizes["optax.adamw"]
    coded = [
        x for x in jax.tree.leaves(states["galore_adamw8bit"]) if x.dtype == "int8"
    ]
    assert len(coded) == 9  # every first moment but the norm's


def test_each_trace_begins_anew() -> None:
    traces = []

    def update(updates: jax.Array, state: tuple[()], params: jax.Array) -> object:
        traces.append(updates)
        return updates, state

    params = jax.numpy.ones(3)
    for number in range(1, 3):
        made = optax.GradientTransformation(lambda params: (), update)
        row = trace_time.traced(lambda made=made: made, params)
        assert len(traces) == number
        assert row.keys() == {"trace", "lower"}


def test_ratios_are_those_within_a_round() -> None:
    found = {
        "optax.adamw": {"trace": [1.0, 2.0, 4.0]},
        "optax.contrib.galore": {"trace": [2.0, 2.0, 2.0]},
        "galore_adamw": {"trace": [3.0, 4.0, 40.0]},
    }
    cell = trace_time.summary(found)["galore_adamw"]["trace"]
    assert cell["seconds"] == 4.0
    assert cell["over"] == {"optax.adamw": 3.0, "optax.contrib.galore": 2.0}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_all_that_is_timed_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    params = trace_time.make_params(1, {"width": 16, "hidden": 24, "vocab": 32})
    subjects = trace_time.transformations()
    some = {name: subjects[name] for name in trace_time.BASES}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace_time, "transformations", lambda: some)
        found = trace_time.measure(params, 2, 1)
    trace_time.show(trace_time.summary(found))
    out = capsys.readouterr().out
    for name in some:
        assert name in out
    assert out.count("later un-jitted updates") == 1  # not of contrib's
    assert out.count("x optax.adamw") == 4 + 2
    assert all(len(x) == 2 for row in found.values() for x in row.values())
