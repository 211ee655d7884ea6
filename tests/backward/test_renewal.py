# SPDX-License-Identifier: Apache-2.0
"""Bases found by passes of the loss, beside those found from its gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from optax.contrib import MuonDimensionNumbers

import galore_optax
from galore_optax import subspace, value_and_projected_grad
from tests.backward.helpers import RANK, assert_close, both, galore, normals, x64

# In f64 products added up in another order differ by 1e-15. Five iterations raise the
# ratio of two singular values, at most 10 here, to the tenth power before the last
# rows are made orthonormal, and one pass between two iterations takes most of it back.
SAME = 1e-7

LAYERS, TOKENS, WIDTH, HIDDEN = 3, 20, 6, 10
PARAMS = normals(1, down=(LAYERS, HIDDEN, WIDTH), up=(LAYERS, WIDTH, HIDDEN))
AXES = {name: MuonDimensionNumbers(1, 2) for name in PARAMS}
X = normals(2, x=(TOKENS, WIDTH))["x"]

METHODS = {
    "power": subspace.power(product_dtype=jnp.float32),
    "randomized": subspace.randomized(oversample=1, power_steps=1),
    "random": subspace.random(),
}


def loss(params: Any, x: Any) -> Any:
    @jax.checkpoint
    def layer(x: Any, weights: Any) -> Any:
        return x + jnp.tanh(x @ weights["up"]) @ weights["down"], None

    return jnp.mean(jnp.sin(lax.scan(layer, x, params)[0] + 0.3))


def stacked(**chosen: Any) -> optax.GradientTransformation:
    return galore(weight_dimension_numbers=AXES, **chosen)


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), tree)


def spans(state: Any) -> Any:
    """`P Pᵀ` of every basis: signs of columns mean nothing."""
    return jax.tree.map(lambda p: p @ p.swapaxes(-1, -2), state.projector)


def assert_same_bases(found: Any, expected: Any) -> None:
    assert_close(spans(found), spans(expected), SAME)
    assert_close(found.refresh, expected.refresh, 0)


@pytest.mark.parametrize(
    ("name", "proj_type"),
    [("power", "left"), ("power", "full"), ("randomized", "full"), ("random", "right")],
)
def test_bases_are_those_of_the_gradient(name: str, proj_type: Any) -> None:
    with x64():
        tx = stacked(subspace=METHODS[name], proj_type=proj_type)
        params, x = wide((PARAMS, X))
        state = tx.init(params)
        found, expected = jax.jit(both(loss, tx))(params, state, x)
        assert_same_bases(found[2], expected[2])
        assert_close(found[0], expected[0], SAME)
        old = jnp.concatenate(list(map(jnp.ravel, jax.tree.leaves(spans(state)))))
        new = jnp.concatenate(list(map(jnp.ravel, jax.tree.leaves(spans(found[2])))))
        assert jnp.max(jnp.abs(new - old)) > 0.1


@pytest.mark.parametrize("name", ["power", "randomized"])
def test_several_matrices_a_turn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerators take them, with one stack that has a direction of zeros."""

    def elsewhere(*arguments: Any, default: Any, **platforms: Any) -> Any:
        del platforms
        return default(*arguments)

    with x64():
        tx = stacked(subspace=METHODS[name])
        params, x = wide((PARAMS, X))
        params["down"] = params["down"].at[1].set(0)  # then up[1] has no gradient
        state = tx.init(params)
        one_by_one = jax.jit(value_and_projected_grad(loss, tx))(params, state, x)
        monkeypatch.setattr(lax, "platform_dependent", elsewhere)
        several = jax.jit(value_and_projected_grad(loss, tx))(params, state, x)
        assert_same_bases(several[2], one_by_one[2])
        assert several[2].refresh.refused["up"].tolist() == [0, 1, 0]


def test_bases_of_a_gradient_of_any_size() -> None:
    """Squares of 1e-30 are zero in f32; the basis does not depend on the scale."""
    tx = stacked(subspace=METHODS["power"])

    def bases(scale: Any) -> Any:
        run = value_and_projected_grad(lambda p, x: scale * loss(p, x), tx)
        return spans(run(PARAMS, tx.init(PARAMS), X)[2])

    expected, *found = map(jax.jit(bases), (1.0, 1e-30, 1e30))
    for each in found:
        assert_close(each, expected, 1e-3)  # the check of orthonormality in f32


@pytest.mark.parametrize("name", ["power", "randomized"])
def test_small_directions_survive_rounding(name: str) -> None:
    """The square of a gradient five times over would leave 1e-13 of the second."""
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.normal(size=(n, WIDTH)))[0] for n in (8, 12))
    gradient = jnp.asarray((left * 0.05 ** np.arange(WIDTH)) @ right.T, jnp.float32)
    method = {
        "power": METHODS["power"],
        "randomized": subspace.randomized(oversample=0, power_steps=4),
    }[name]

    def linear(params: Any, dy: Any) -> Any:
        return jnp.sum((jnp.eye(8) @ params["w"]) * dy)

    params = {"w": jnp.zeros((8, 12))}
    tx = galore(subspace=method, proj_type="left")
    run = jax.jit(value_and_projected_grad(linear, tx))
    basis = run(params, tx.init(params), gradient)[2].projector["w"]
    # Each direction in f32, divided by its singular value.
    captured = np.linalg.norm(np.asarray(basis).T @ left[:, :RANK], axis=0)
    np.testing.assert_allclose(captured, 1, atol=10 * 2**-24 / 0.05)


@pytest.mark.parametrize("bad", [0.0, jnp.nan, jnp.inf])
def test_refuses_a_basis_of_a_bad_gradient(bad: float) -> None:
    tx = stacked(subspace=METHODS["power"])
    state = tx.init(PARAMS)
    new = jax.jit(value_and_projected_grad(loss, tx))(PARAMS, state, bad * X)[2]
    assert_close(new.projector, state.projector, 0)
    assert {int(x) for y in jax.tree.leaves(new.refresh.refused) for x in y} == {1}
    assert {int(x) for y in jax.tree.leaves(new.refresh.last) for x in y} == {-1}


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4])
def test_stores_bases_in_few_bits(dtype: Any) -> None:
    with x64():
        tx = stacked(subspace=METHODS["power"], projector_dtype=dtype)
        params, x = wide((PARAMS, X))
        found, expected = jax.jit(both(loss, tx))(params, tx.init(params), x)
        assert_close(found[2], expected[2], SAME)


def partly_due(tx: optax.GradientTransformation, params: Any, count: int) -> Any:
    """A state whose matrices were refreshed at step 0, but one that never was."""
    state = tx.init(params)
    last = jax.tree.map(jnp.zeros_like, state.refresh.last)
    last = dict(last, up=last["up"].at[1].set(-1))
    refresh = state.refresh._replace(last=last)
    return state._replace(count=jnp.int32(count), refresh=refresh)


def test_renews_what_is_due_and_nothing_else() -> None:
    """In lanes of a `vmap` that differ, staggered, some cold and some not."""
    with x64():
        tx = stacked(
            subspace=METHODS["power"], update_proj_gap=2 * LAYERS, stagger=True
        )
        params, x = wide((PARAMS, X))
        states = [partly_due(tx, params, count) for count in (1, 3)]
        lanes = jax.tree.map(lambda *x: jnp.stack(x), *states)
        run = jax.jit(jax.vmap(both(loss, tx), (None, 0, None)))
        found, expected = run(params, lanes, x)
        assert_same_bases(found[2], expected[2])
        last = np.concatenate(jax.tree.leaves(found[2].refresh.last), axis=1)
        assert sorted(last[0]) == [0, 0, 0, 0, 1, 1]
        assert sorted(last[1]) == [0, 0, 3, 3, 3, 3]


@pytest.mark.parametrize("shares", [1, 3])
def test_passes(shares: int) -> None:
    """Two for each iteration of the matrix that takes most, and the step's own."""
    seen: list[int] = []

    def noisy(params: Any, x: Any) -> Any:
        jax.debug.callback(lambda: seen.append(1))
        return loss(params, x)

    tx = stacked(subspace=subspace.power(steps=1, cold_steps=3), update_proj_gap=2)
    step = jax.jit(value_and_projected_grad(noisy, tx, refresh_shares=shares))
    state, counts = tx.init(PARAMS), []
    for _ in range(3):
        _, low, state = step(PARAMS, state, X)
        _, state = galore_optax.update_projected(tx, low, state, PARAMS)
        jax.effects_barrier()
        counts.append(len(seen))
        seen.clear()
    used = min(shares, len(PARAMS))
    assert counts == [used * 2 * 3 + 1, 1, used * 2 * 1 + 1]


def test_shares_of_the_leaves_find_the_same_bases() -> None:
    with x64():
        tx = stacked(subspace=METHODS["power"], proj_type="full")
        params, x = wide((PARAMS, X))
        state = tx.init(params)
        whole, shared = (
            value_and_projected_grad(loss, tx, refresh_shares=shares)
            for shares in (1, 2)
        )
        run = jax.jit(lambda *args: (whole(*args), shared(*args)))
        expected, found = run(params, state, x)
        assert_same_bases(found[2], expected[2])


@pytest.mark.parametrize(
    ("shares", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError)]
)
def test_refuses_shares_that_are_none(shares: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"refresh_shares={shares}"):
        value_and_projected_grad(loss, stacked(), refresh_shares=shares)


def test_forms_gradients_for_methods_that_need_them() -> None:
    exact, quick = galore(subspace=subspace.svd()), galore(subspace=METHODS["power"])
    tx = optax.partition({"a": exact, "b": quick}, {"v": "a", "w": "b"})
    params = normals(1, v=(10, 6), w=(6, 10))

    def mlp(params: Any, x: Any) -> Any:
        return jnp.mean(jnp.sin(jnp.tanh(x @ params["w"]) @ params["v"] + 0.3))

    found, expected = jax.jit(both(mlp, tx))(params, tx.init(params), X)
    assert_close(found, expected, 1e-5)
    explained = galore_optax.explain(mlp, tx, params, X)
    assert len(explained.formed_to_refresh) == 1
    assert "all: formed by a refresh, for _SVD(" in str(explained)
    assert not galore_optax.explain(mlp, quick, params, X).formed_to_refresh


MICRO = 4


def accumulated(params: Any, batches: Any) -> Any:
    """The mean over micro-batches, one at a time."""

    @jax.checkpoint
    def add(total: Any, x: Any) -> Any:
        return total + loss(params, x) / len(batches), None

    return lax.scan(add, jnp.zeros((), batches.dtype), batches)[0]


def test_bases_come_from_all_micro_batches() -> None:
    with x64():
        tx = stacked(subspace=METHODS["power"])
        params, x = wide((PARAMS, X))
        batches = x.reshape(MICRO, -1, WIDTH)

        def run(params: Any, state: Any) -> Any:
            one_by_one = value_and_projected_grad(accumulated, tx)
            at_once = value_and_projected_grad(loss, tx)
            return one_by_one(params, state, batches), at_once(params, state, x)

        found, expected = jax.jit(run)(params, tx.init(params))
        assert_same_bases(found[2], expected[2])
        assert_close(found[:2], expected[:2], SAME)
        explained = galore_optax.explain(accumulated, tx, params, batches)
        assert not any(leaf.formed for leaf in explained)


def test_micro_batches_take_the_memory_of_one() -> None:
    """What more there is of them are sums of coordinates, small beside activations."""
    tokens = 2048
    tx = stacked(subspace=METHODS["power"])

    def temporaries(loss: Any, *shape: int) -> int:
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        run = jax.jit(value_and_projected_grad(loss, tx))
        compiled = run.lower(PARAMS, jax.eval_shape(tx.init, PARAMS), x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one = temporaries(loss, tokens, WIDTH)
    # The slice that is at work, and the same once more for its cotangent.
    slices = 2 * tokens * WIDTH * 4
    assert temporaries(accumulated, MICRO, tokens, WIDTH) < one + slices + one // 4
