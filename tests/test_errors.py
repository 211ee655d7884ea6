# SPDX-License-Identifier: Apache-2.0
"""Bad input gets an error with leaf, value and remedy, before anything changes."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Dims

import galore_optax as go

ADAM = optax.adam(0.1)
PARAMS = {
    "a": {"kernel": jnp.ones((16, 8))},
    "b": jnp.ones((3, 8, 6)),
    "c": jnp.ones(5),
}


@pytest.mark.parametrize("rank", [0, -3, 2.5, True, "8", None])
def test_rank(rank: Any) -> None:
    with pytest.raises(ValueError, match=r"rank=.* must be a positive int.* share"):
        go.galore(ADAM, rank=rank)
    with pytest.raises(
        ValueError, match=r"rank=.* of 'a/kernel' must be a positive int"
    ):
        go.galore(ADAM, rank=lambda leaf: rank).init(PARAMS)


def test_traced_rank_says_what_to_write() -> None:
    tx = optax.inject_hyperparams(go.galore_adamw)(learning_rate=0.1)
    with pytest.raises(TypeError, match=r"static_args=galore_optax\.STATIC_ARGS"):
        jax.jit(tx.init)(PARAMS)


@pytest.mark.parametrize("gap", [0, -1, 1.5, True])
def test_gap(gap: Any) -> None:
    with pytest.raises(ValueError, match=r"update_proj_gap=.* must be a positive int"):
        go.galore(ADAM, update_proj_gap=gap)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 0.0, -1.0])
def test_scale(scale: float) -> None:
    with pytest.raises(ValueError, match="must be positive and finite"):
        go.galore(ADAM, scale=scale)
    with pytest.raises(TypeError, match="must be a number"):
        go.galore(ADAM, scale="big")


def test_names() -> None:
    with pytest.raises(ValueError, match=r"proj_type='both' is unknown.*'std'"):
        go.galore(ADAM, proj_type="both")
    for method in ("svd", go.subspace.svd, 3):
        with pytest.raises(TypeError, match="no subspace method"):
            go.galore(ADAM, subspace=method)


@pytest.mark.parametrize("inner", [3, optax.adam, "adam", go.galore(rank=2)])
def test_inner(inner: Any) -> None:
    with pytest.raises(TypeError, match="Pass"):
        go.galore(inner)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Dims(0, 0), r"axes of 'a/kernel'.*overlap"),
        (Dims((0, 1), 1), r"axes of 'a/kernel'.*overlap"),
        (
            Dims(0, 2),
            r"output_axis=.* of 'a/kernel' is out of range for shape \(16, 8\)",
        ),
        (Dims(-3, 0), r"reduction_axis=.* of 'a/kernel' is out of range"),
        (Dims((), 0), r"reduction_axis of 'a/kernel' is empty"),
    ],
)
def test_axes(spec: Any, message: str) -> None:
    numbers = {"a": {"kernel": spec}, "b": None, "c": None}
    with pytest.raises(ValueError, match=message):
        go.galore(ADAM, rank=2, weight_dimension_numbers=numbers).init(PARAMS)


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ({"a": Dims(0, 1), "z": None}, ValueError, "entry at 'z'"),
        ({"a": Dims(0, 1)}, ValueError, "says nothing about the leaf 'b'"),
        ({"a": 3, "b": None, "c": None}, TypeError, "at 'a' is 3"),
        ({"a": None, "b": True, "c": None}, ValueError, r"selects 'b' of shape"),
    ],
)
def test_trees_of_numbers(numbers: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        go.galore(ADAM, rank=2, weight_dimension_numbers=numbers).init(PARAMS)


@pytest.mark.parametrize(
    "leaf",
    [jnp.ones((4, 4), int), jnp.ones((4, 4), jnp.complex64), jnp.ones((0, 4))],
    ids=["int", "complex", "empty"],
)
def test_unsuitable_leaves_are_an_error_only_where_selected(leaf: Any) -> None:
    params = {"w": jnp.ones((8, 8)), "odd": leaf}
    assert go.galore(ADAM, rank=2).init(params) is not None
    numbers = {"w": Dims(1, 0), "odd": Dims(1, 0)}
    with pytest.raises(ValueError, match=r"'odd'.*is selected for projection"):
        go.galore(ADAM, rank=2, weight_dimension_numbers=numbers).init(params)


def test_nothing_projected() -> None:
    with pytest.raises(
        ValueError, match=r"projects no leaf.*'norm/scale' \(4,\): norm"
    ):
        go.galore(ADAM).init({"norm": {"scale": jnp.ones(4)}})


def test_updates_of_another_tree() -> None:
    tx = go.galore(ADAM, rank=2)
    params = {"w": jnp.ones((8, 8)), "v": jnp.ones((8, 4))}
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"different trees: updates lack 'v'\. Pass"):
        tx.update({"w": params["w"]}, state, params)
    with pytest.raises(ValueError, match="different trees: params lack 'v'"):
        tx.update(params, state, {"w": params["w"]})
    with pytest.raises(ValueError, match="updates lack 'v'; params lack 'u'"):
        tx.update({"w": params["w"], "u": params["v"]}, state, params)
    with pytest.raises(ValueError, match=r"update of 'v' has shape \(8, 6\)"):
        tx.update({"w": params["w"], "v": jnp.ones((8, 6))}, state, params)
    with pytest.raises(ValueError, match="another tree of parameters"):
        tx.update({"w": params["w"]}, state)


def test_state_of_another_configuration() -> None:
    params = {"w": jnp.ones((8, 8)), "v": jnp.ones((8, 4))}
    state = go.galore(ADAM, rank=2).init(params)
    before = jax.tree.map(np.asarray, state)
    for kwargs in ({"rank": 3}, {"rank": 2, "proj_type": "full"}):
        with pytest.raises(ValueError, match=r"rank 2 and shape .* for 'v', but"):
            go.galore(ADAM, **kwargs).update(params, state, params)
    one = go.galore(ADAM, rank=2, weight_dimension_numbers={"w": True, "v": None})
    with pytest.raises(ValueError, match=r"for 'v', but.*needs no projector"):
        one.update(params, state, params)
    jax.tree.map(np.testing.assert_array_equal, before, state)


def test_state_of_0_1() -> None:
    tx = go.galore(ADAM, rank=4)
    state = tx.init(PARAMS)
    counters = go.Refresh(*(jnp.zeros(4, jnp.int32) for _ in range(2)))
    with pytest.raises(ValueError, match=r"as galore_optax 0\.1 did.*call init"):
        tx.update(PARAMS, state._replace(refresh=counters), PARAMS)


def test_chain() -> None:
    with pytest.raises(ValueError, match=r"galore without an inner at places \[0, 2\]"):
        go.chain(go.galore(rank=2), optax.clip(1.0), go.galore(rank=2), ADAM)
    with pytest.raises(TypeError, match="argument 1 of chain"):
        go.chain(go.galore(rank=2), optax.adam)


def test_explicit_scale_without_an_inner() -> None:
    with pytest.raises(ValueError, match=r"scale=0.5 has no effect"):
        go.galore(rank=2, scale=0.5)
    with pytest.raises(ValueError, match=r"scale=0.25 has no effect"):
        go.galore(rank=2, scale=0.25)


def test_a_method_that_returns_the_wrong_shape() -> None:
    class Wrong:
        orthonormal = True

        def basis(self, gradient: Any, previous: Any, key: Any, cold: Any) -> Any:
            return gradient

    tx = go.galore(ADAM, rank=2, subspace=Wrong())
    params = {"w": jnp.ones((8, 12))}
    with pytest.raises(ValueError, match=r"returned a basis of shape .* must be"):
        tx.update(params, tx.init(params))


def test_helpers_need_a_galore() -> None:
    for helper in (go.describe, go.refresh_schedule):
        with pytest.raises(ValueError, match="contains no galore"):
            helper(ADAM, PARAMS)
    with pytest.raises(ValueError, match="update_proj_gap of 'w' is traced"):
        go.refresh_schedule(
            optax.inject_hyperparams(go.galore, static_args=go.STATIC_ARGS)(
                ADAM, rank=2
            ),
            {"w": jnp.ones((8, 8))},
        )


def test_adafactor_needs_params() -> None:
    tx = go.galore_adafactor(0.1, rank=2)
    params = {"w": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match="call update"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize("arguments", [{"oversample": -1}, {"power_steps": -1}])
def test_randomized_arguments(arguments: Any) -> None:
    with pytest.raises(ValueError, match="negative"):
        go.subspace.randomized(**arguments)


@pytest.mark.parametrize("arguments", [{"steps": 0}, {"cold_steps": 0}])
def test_power_arguments(arguments: Any) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        go.subspace.power(**arguments)


def test_power_takes_a_floating_dtype() -> None:
    with pytest.raises(ValueError, match=r"product_dtype=int8.*jnp.float32"):
        go.subspace.power(product_dtype=jnp.int8)


def test_arguments_that_an_optimizer_does_not_take() -> None:
    for make in (go.galore_adamw, go.galore_adamw8bit, go.galore_adafactor):
        with pytest.raises(TypeError, match="ranks"):
            make(0.1, ranks=8)
    with pytest.raises(TypeError, match=r"no moment_dtype\. Choose"):
        go.galore_adamw8bit(0.1, moment_dtype=jnp.float32)


def test_every_optimizer_shows_the_arguments_of_galore() -> None:
    # Each has an inner of its own, with a learning rate, which a residual refuses.
    ours = set(inspect.signature(go.galore).parameters) - {"inner", "residual"}
    for make in (go.galore_adamw, go.galore_adamw8bit, go.galore_adafactor):
        found = inspect.signature(make).parameters
        missing = ours - set(found)
        assert missing == ({"moment_dtype"} if make is go.galore_adamw8bit else set())


def test_other_types() -> None:
    with pytest.raises(TypeError, match="stagger=1 must be True or False"):
        go.galore(ADAM, stagger=1)
    for name in ("projector_dtype", "moment_dtype"):
        with pytest.raises(TypeError, match=f"{name}=.*floating-point"):
            go.galore(ADAM, **{name: jnp.int16})
