# SPDX-License-Identifier: Apache-2.0
"""Any optax optimizer inside galore: unchanged in a full basis, exact off the span."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import galore_optax
from galore_optax._inner import run as _run
from galore_optax._inner.params_use import depends_on_values, read_use
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


@pytest.mark.filterwarnings("ignore:the rank reaches a dimension")
@pytest.mark.parametrize("name", INNERS)
def test_square_identity_basis_changes_nothing(name: str) -> None:
    make = INNERS[name].make
    tx = galore_optax.galore(
        make(),
        rank=64,
        scale=1.0,
        subspace=Identity(),
        weight_dimension_numbers=MuonDimensionNumbers(1, 0),
    )
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


def use_of(inner: optax.GradientTransformation, **extra: Any) -> str:
    """What is read off a step of galore with `inner`."""
    seen = []

    def spy(*args: Any) -> Any:
        seen.append(read_use(*args))
        return seen[-1]

    tx = galore_optax.galore(inner, rank=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_run, "read_use", spy)
        jax.eval_shape(
            lambda tree: tx.update(tree, tx.init(tree), tree, **extra), params()
        )
    (reading,) = seen
    return reading.use.name


@pytest.mark.parametrize("name", INNERS)
def test_use_of_params_is_recognised(name: str) -> None:
    found = use_of(INNERS[name].make(), **extra_for(name))
    assert found == INNERS[name].use


RATE = 0.1
# Decay of all of W, written in ways that a list of primitives would have to know.
DECAYS = {
    "map": lambda w: jax.lax.map(lambda row: RATE * row, w),
    "scan": lambda w: jax.lax.scan(lambda c, row: (c, RATE * row), 0, w)[1],
    "checkpoint": jax.checkpoint(lambda w: RATE * w),
    "split": lambda w: jnp.concatenate([RATE * x for x in jnp.split(w, 2)]),
    "gather": lambda w: RATE * w[jnp.arange(len(w))],
    "scatter": lambda w: jnp.zeros_like(w).at[jnp.arange(len(w))].add(RATE * w),
    "sort": lambda w: RATE * jnp.flip(w)[::-1, ::-1],
    "jit": jax.jit(lambda w: RATE * w),
    "cond": lambda w: jax.lax.cond(True, lambda x: RATE * x, lambda x: x, w),
}


def decayed_by(decay: Any) -> optax.GradientTransformation:
    def add(updates: Any, params: Any) -> Any:
        def of(update: Any, weight: Any) -> Any:
            return update - decay(weight) if weight.ndim == 2 else update

        return jax.tree.map(of, updates, params)

    return optax.chain(optax.trace(0.9), optax.stateless(add))


@pytest.mark.parametrize("name", DECAYS)
def test_decay_acts_on_all_of_a_weight_however_it_is_written(name: str) -> None:
    tx = galore_optax.galore(decayed_by(DECAYS[name]), rank=2, subspace=Identity())
    weights = normal_like({"w": jnp.zeros((8, 8))}, 0)
    nothing = jax.tree.map(jnp.zeros_like, weights)
    updates, _ = tx.update(nothing, tx.init(weights), weights)
    np.testing.assert_allclose(updates["w"], -RATE * weights["w"], rtol=1e-6)


def test_decay_that_depends_on_the_gradient_is_seen_in_coordinates() -> None:
    def add(updates: Any, params: Any) -> Any:  # cautious weight decay
        return jax.tree.map(
            lambda u, w: u - RATE * jnp.where(u * w > 0, w, 0), updates, params
        )

    assert use_of(optax.chain(optax.sgd(1.0), optax.stateless(add))) == "COORDINATES"


def test_decay_without_a_forward_derivative_falls_back_aloud() -> None:
    @jax.custom_vjp
    def decay(w: jax.Array) -> jax.Array:
        return RATE * w

    decay.defvjp(lambda w: (RATE * w, None), lambda _, g: (RATE * g,))
    with pytest.warns(UserWarning, match=r"add_decayed_weights around galore"):
        assert use_of(decayed_by(decay)) == "COORDINATES"


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


@pytest.mark.optimized
@pytest.mark.parametrize("inner", [optax.adam(LR), optax.adamw(LR), optax.lion(LR)])
def test_no_product_beyond_project_and_lift(
    inner: optax.GradientTransformation,
) -> None:
    assert products(galore_optax.galore(inner, rank=4)) == 2


@pytest.mark.optimized
def test_coordinates_cost_one_product_more() -> None:
    assert products(galore_optax.galore(optax.lamb(LR), rank=4)) == 3


def test_decay_of_several_kinds_in_one_tree() -> None:
    def add(updates: Any, params: Any) -> Any:
        rows = jnp.arange(8.0)[:, None]
        return {
            "number": updates["number"] + jnp.negative(RATE * params["number"]),
            "rows": updates["rows"] - RATE * rows * params["rows"],
            "sum": updates["sum"] - RATE * (params["sum"] + 2 * params["sum"]),
            "none": updates["none"],
        }

    inner = optax.chain(optax.sgd(1.0), optax.stateless(add))
    tx = galore_optax.galore(inner, rank=2, subspace=Identity())
    names = ("number", "rows", "sum", "none")
    weights = normal_like({name: jnp.zeros((8, 8)) for name in names}, 0)
    nothing = jax.tree.map(jnp.zeros_like, weights)
    updates, _ = tx.update(nothing, tx.init(weights), weights)
    factors = {"number": 1, "rows": np.arange(8.0)[:, None], "sum": 3, "none": 0}
    for name, factor in factors.items():
        expected = -RATE * factor * weights[name]
        np.testing.assert_allclose(updates[name], expected, rtol=1e-6)


def test_a_factor_made_of_the_gradient_is_seen_in_coordinates() -> None:
    def add(updates: Any, params: Any) -> Any:
        size = optax.tree.norm(updates)
        return jax.tree.map(lambda u, w: u - RATE * size * w, updates, params)

    assert use_of(optax.chain(optax.sgd(1.0), optax.stateless(add))) == "COORDINATES"


def test_what_the_inner_does_is_read_once() -> None:
    traced = []

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        traced.append(jax.tree.leaves(params)[0].shape)
        return jax.tree.map(lambda u, p: u - 0.1 * p, updates, params), state

    inner = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
    tx, start = galore_optax.galore(inner, rank=2), {"w": jnp.ones((8, 12))}
    state = tx.init(start)
    assert traced == [(8, 12)]
    for steady in (False, None):
        step = jax.jit(functools.partial(tx.update, refresh=steady))
        step(start, state, start)
    assert traced == [(8, 12), (2, 12), (2, 12)]


@pytest.mark.parametrize("decay", [0.1, 0.2])
def test_a_traced_hyper_parameter_is_read_in_its_own_trace(decay: float) -> None:
    """Nothing of one trace is left for the next."""
    start = {"w": jnp.ones((8, 12))}

    def step(decay: jax.Array) -> Any:
        inner = optax.chain(optax.sgd(1.0), optax.add_decayed_weights(-decay))
        tx = galore_optax.galore(inner, rank=2)
        return tx.update(start, tx.init(start), start)[0]["w"]

    twice = [jax.jit(step)(x) - jax.jit(step)(0.0) for x in (decay, 2 * decay)]
    np.testing.assert_allclose(twice[0], -decay * start["w"], rtol=1e-6)
    np.testing.assert_allclose(twice[1], 2 * twice[0], rtol=1e-6)
