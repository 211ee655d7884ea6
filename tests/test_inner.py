# SPDX-License-Identifier: Apache-2.0
"""Any optax optimizer inside galore: unchanged in a full basis, exact off the span."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax._inner import depends_on_values
from tests.helpers import Identity, normal_like
from tests.optimizers import EXCEPTIONS, INNERS, LR, exported

PARAMS = {"w": (12, 12), "stack": {"kernel": (3, 8, 8), "bias": (3, 8)}, "norm": (5,)}


def params() -> Any:
    shapes = jax.tree.map(jnp.zeros, PARAMS, is_leaf=lambda x: isinstance(x, tuple))
    return normal_like(shapes, seed=0)


def run(tx: optax.GradientTransformation, start: Any, steps: int, **extra: Any) -> Any:
    tx = optax.with_extra_args_support(tx)
    weights, state = start, tx.init(start)
    update = jax.jit(functools.partial(tx.update, **extra))
    for step in range(steps):
        updates, state = update(normal_like(start, seed=step + 1), state, weights)
        weights = optax.apply_updates(weights, updates)
    return weights


def extra_for(name: str) -> dict[str, Any]:
    return {"value": jnp.float32(2.0)} if name == "polyak_sgd" else {}


def test_every_exported_optimizer_is_accounted_for() -> None:
    listed = {name.split(",")[0] for name in INNERS} | set(EXCEPTIONS)
    assert exported() <= listed


@pytest.mark.parametrize("name", INNERS)
def test_square_identity_basis_changes_nothing(name: str) -> None:
    make = INNERS[name].make
    tx = galore_optax.galore(make(), rank=64, scale=1.0, subspace=Identity())
    ours = run(tx, params(), 6, **extra_for(name))
    plain = run(make(), params(), 6, **extra_for(name))
    # The same operations but for P = I products, which are exact, and the order in
    # which the decay is added: a few ulps of values near 1, six times.
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=40 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("name", INNERS)
def test_off_the_span_only_the_decay_acts(name: str) -> None:
    rank, width, steps = 3, 12, 4
    inside = jnp.zeros((width, width)).at[:, :rank].set(1.0)  # std: columns
    tx = optax.with_extra_args_support(
        galore_optax.galore(INNERS[name].make(), rank=rank, subspace=Identity())
    )
    weights = {"w": normal_like({"w": jnp.zeros((width, width))}, 0)["w"]}
    state, update, moved = tx.init(weights), jax.jit(tx.update), False
    for step in range(steps):
        grads = {"w": normal_like(weights, step + 1)["w"] * inside}
        before = weights["w"]
        updates, state = update(grads, state, weights, **extra_for(name))
        weights = optax.apply_updates(weights, updates)
        expected = before * (1 - INNERS[name].decay)
        np.testing.assert_allclose(
            weights["w"][:, rank:], expected[:, rank:], rtol=3e-7, atol=0
        )
        moved |= not np.array_equal(weights["w"][:, :rank], expected[:, :rank])
    assert moved  # rprop rests on its first step


@pytest.mark.parametrize("name", INNERS)
def test_use_of_params_is_recognised(name: str, monkeypatch: Any) -> None:
    from galore_optax import _run

    seen = []

    def spy(*args: Any) -> Any:
        seen.append(_run_params_use(*args))
        return seen[-1]

    _run_params_use = _run.params_use
    monkeypatch.setattr(_run, "params_use", spy)
    run(
        galore_optax.galore(INNERS[name].make(), rank=4), params(), 1, **extra_for(name)
    )
    assert {use.name for use in seen} == {INNERS[name].use}


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.contrib.schedule_free_adamw(LR),
        lambda: optax.contrib.prodigy(),
        lambda: optax.contrib.dog(1.0),
        lambda: optax.contrib.dadapt_adamw(),
        lambda: optax.contrib.madgrad(LR),
        lambda: optax.contrib.mechanize(optax.adam(LR)),
    ],
    ids=["schedule_free", "prodigy", "dog", "dadapt_adamw", "madgrad", "mechanize"],
)
def test_inners_that_hold_parameter_values_are_refused(make: Any) -> None:
    if not depends_on_values(make().init, params()):
        pytest.skip("this version of optax keeps no parameter values in that state")
    with pytest.raises(ValueError, match=r"keeps parameter values.*around galore"):
        galore_optax.galore(make(), rank=4).init(params())


def test_galore_with_adamw_equals_galore_adamw() -> None:
    schedule = optax.linear_schedule(0.1, 0.01, 10)
    one = galore_optax.galore(optax.adamw(schedule, weight_decay=0.1), rank=3)
    two = galore_optax.galore_adamw(schedule, weight_decay=0.1, rank=3)
    for a, b in zip(
        jax.tree.leaves(run(one, params(), 6)),
        jax.tree.leaves(run(two, params(), 6)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("steps_before", [0, 5])
def test_decay_follows_live_counters_and_masks(steps_before: int) -> None:
    # A zeroed counter would restart the warm-up, whose rate at step 0 is 0.
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    mask = {"a": True, "b": False}
    tx = galore_optax.galore(
        optax.adamw(schedule, weight_decay=0.5, mask=mask), rank=2, subspace=Identity()
    )
    weights = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    grads = jax.tree.map(jnp.zeros_like, weights)
    state = tx.init(weights)
    for _ in range(steps_before):
        _, state = tx.update(grads, state, weights)
    updates, _ = tx.update(grads, state, weights)
    rate = float(schedule(steps_before))
    np.testing.assert_allclose(updates["a"], -rate * 0.5, rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 0)


def test_eps_zero_makes_no_nan() -> None:
    tx = galore_optax.galore(optax.adamw(LR, eps=0.0, weight_decay=0.1), rank=4)
    for leaf in jax.tree.leaves(run(tx, params(), 3)):
        assert np.isfinite(leaf).all()


def products(tx: optax.GradientTransformation, steady: bool = True) -> int:
    weights = {"w": jnp.ones((24, 40))}
    state = jax.eval_shape(tx.init, weights)

    def update(grads: Any, state: Any, weights: Any) -> Any:
        return tx.update(grads, state, weights, refresh=not steady)

    text = jax.jit(update).lower(weights, state, weights).compile().as_text()
    return text.count(" dot(")


@pytest.mark.parametrize("inner", [optax.adam(LR), optax.adamw(LR), optax.lion(LR)])
def test_no_product_beyond_project_and_lift(
    inner: optax.GradientTransformation,
) -> None:
    assert products(galore_optax.galore(inner, rank=4)) == 2


def test_coordinates_cost_one_product_more() -> None:
    assert products(galore_optax.galore(optax.lamb(LR), rank=4)) == 3
