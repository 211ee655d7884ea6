# SPDX-License-Identifier: Apache-2.0
"""How `value_and_projected_grad` and `explain` are called, and what they refuse."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from optax.contrib import MuonDimensionNumbers

import galore_optax
from galore_optax import explain, value_and_projected_grad
from tests.backward.helpers import (
    RANK,
    assert_close,
    both,
    formed,
    galore,
    normals,
    state_of,
)

# One order of adding some hundred f32 terms against another: no more than 1e-7 each, in
# two products after another, of terms that may be ten times their sum.
F32 = 1e-5

PARAMS = normals(1, v=(10, 6), w=(6, 10))
X = normals(2, x=(5, 6))["x"]


def loss(params: Any, x: Any) -> Any:
    return jnp.sum(jnp.sin(jnp.tanh(x @ params["w"]) @ params["v"] + 0.3))


@pytest.mark.parametrize("when", [None, True, "traced"])
def test_renews_bases_first(when: Any) -> None:
    """The power method follows the last bits of a gradient, these bases do not."""
    tx = galore(subspace=galore_optax.subspace.random())
    state = tx.init(PARAMS)
    when = jnp.bool_(True) if when == "traced" else when
    found, expected = jax.jit(both(loss, tx, when))(PARAMS, state, X)
    assert_close(found, expected, F32)
    assert set(map(int, jax.tree.leaves(found[2].refresh.last))) == {0}


def test_a_basis_from_the_gradient() -> None:
    tx = galore(subspace=galore_optax.subspace.svd(), proj_type="left")
    state = tx.init(PARAMS)
    _, low, new = jax.jit(value_and_projected_grad(loss, tx))(PARAMS, state, X)
    gradient = jax.grad(loss)(PARAMS, X)["w"]
    captured = np.linalg.svd(gradient, compute_uv=False)[:RANK]
    assert float(jnp.linalg.norm(low["w"])) == pytest.approx(
        float(np.linalg.norm(captured)), F32
    )
    assert not jnp.allclose(new.projector["w"], state.projector["w"])


def test_renews_what_is_due_in_any_lane_of_a_vmap() -> None:
    tx = galore(subspace=galore_optax.subspace.random())
    states = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(2))
    states = states._replace(count=jnp.array([0, 1]))
    last = jax.tree.map(lambda x: x.at[1].set(0), states.refresh.last)
    states = states._replace(refresh=states.refresh._replace(last=last))
    mapped = jax.jit(jax.vmap(both(loss, tx), (None, 0, None)))
    found, expected = mapped(PARAMS, states, X)
    assert_close(found, expected, F32)
    assert set(np.ravel(jax.tree.leaves(found[2].refresh.last))) == {0}


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int4])
def test_decodes_projectors(dtype: Any) -> None:
    axes = MuonDimensionNumbers(-2, -1)
    tx = galore(projector_dtype=dtype, weight_dimension_numbers=axes, proj_type="full")
    params = {"w": normals(1, w=(2, 2, 6, 10))["w"]}

    def nested(params: Any, x: Any) -> Any:
        def outer(x: Any, stack: Any) -> Any:
            y, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, stack)
            return y + 0.1 * x @ stack.transpose(1, 0, 2).reshape(6, -1)[:, :6], None

        return jnp.sum(jnp.sin(lax.scan(outer, x, params["w"])[0] + 0.3))

    found, expected = jax.jit(both(nested, tx, False))(params, state_of(tx, params), X)
    assert_close(found, expected, F32)


def labels(params: Any) -> Any:
    return {"v": "right", "w": "left"}


WRAPPED = {
    "chain": lambda: optax.chain(galore(), optax.scale(2.0)),
    "partition": lambda: optax.partition(
        {side: galore(proj_type=side) for side in ("left", "right")}, labels
    ),
    "masked": lambda: optax.masked(galore(), {"v": False, "w": True}),
    "injected": lambda: galore_optax.inject_hyperparams(galore_optax.galore_adamw)(
        learning_rate=1e-3, rank=RANK, weight_decay=0.1
    ),
    "MultiSteps": lambda: galore_optax.MultiSteps(galore(), 2),
    "coordinates added": lambda: galore_optax.ProjectedMultiSteps(galore(), 2),
    "no galore": lambda: optax.adam(1e-3),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_finds_galore_wherever_it_is(name: str) -> None:
    tx = WRAPPED[name]()
    found, expected = jax.jit(both(loss, tx, False))(PARAMS, tx.init(PARAMS), X)
    assert_close(found, expected, F32)


def test_update_takes_the_coordinates() -> None:
    tx = galore_optax.galore_adamw(1e-2, rank=RANK, weight_decay=0.1)
    state = state_of(tx, PARAMS)
    _, low, new = value_and_projected_grad(loss, tx, refresh=False)(PARAMS, state, X)
    found = galore_optax.update_projected(tx, low, new, PARAMS)[0]
    gradients = jax.grad(loss)(PARAMS, X)
    expected = tx.update(gradients, state, PARAMS, refresh=False)[0]
    assert_close(found, expected, 1e-3)  # Adam divides by entries that may be small


def test_arguments_and_aux_are_those_of_value_and_grad() -> None:
    tx = galore()
    state = state_of(tx, PARAMS)

    def other(name: str, params: Any, x: Any, *, times: float) -> Any:
        assert name == "a word is no array"
        return times * loss(params, x), {"w": params["w"], "mean": jnp.mean(x)}

    run = value_and_projected_grad(other, tx, argnums=1, has_aux=True, refresh=False)
    (value, aux), low, _ = run(PARAMS, state, "a word is no array", X, times=2.0)
    expected = formed(lambda p, x: 2 * loss(p, x), tx, False)(PARAMS, state, X)
    assert_close((value, low), expected[:2], F32)
    assert_close(aux, {"w": PARAMS["w"], "mean": jnp.mean(X)}, F32)


def test_effects_run_once_a_pass_and_in_order() -> None:
    seen: list[float] = []
    tx = galore(weight_dimension_numbers=MuonDimensionNumbers(1, 2))
    params = normals(1, w=(3, 6, 6))["w"]

    def step(x: Any, w: Any) -> Any:
        jax.debug.callback(lambda v: seen.append(float(v)), jnp.sum(w), ordered=True)
        return jnp.tanh(x @ w), None

    def noisy(params: Any, x: Any) -> Any:
        return jnp.sum(lax.scan(step, x, params)[0])

    run = jax.jit(value_and_projected_grad(noisy, tx, refresh=False))
    jax.block_until_ready(run(params, tx.init(params), X))
    jax.effects_barrier()
    assert seen == pytest.approx([float(jnp.sum(w)) for w in params], abs=F32)


def test_a_primitive_never_seen_before_falls_back() -> None:
    """Whatever has no rule has its gradient formed; sorting stands for it."""
    tx = galore()

    def unusual(params: Any, x: Any) -> Any:
        return loss(params, x) + jnp.sum(jnp.sort(params["w"], axis=0)[1:4] ** 2)

    found, expected = jax.jit(both(unusual, tx, False))(PARAMS, state_of(tx, PARAMS), X)
    assert_close(found, expected, F32)


def test_refuses_several_arguments_as_params() -> None:
    with pytest.raises(TypeError, match=r"argnums=\(0, 1\)\) must be one integer"):
        value_and_projected_grad(loss, galore(), argnums=(0, 1))  # type: ignore[arg-type]


def test_refuses_a_state_of_other_parameters() -> None:
    tx = galore()
    run = value_and_projected_grad(loss, tx)
    with pytest.raises(ValueError, match=r"no GaLoreState for the leaves \['v', 'w'\]"):
        run(PARAMS, tx.init({"u": PARAMS["w"]}), X)
    deeper = galore_optax.galore(optax.sgd(1.0), rank=3).init(PARAMS)
    with pytest.raises(ValueError, match=r"rank 3 and shape .* for 'v'"):
        run(PARAMS, deeper, X)


def test_refuses_clipping_that_would_see_coordinates() -> None:
    tx = optax.chain(optax.clip_by_global_norm(1.0), galore())
    with pytest.raises(ValueError, match="not a linear function of the gradients"):
        value_and_projected_grad(loss, tx)(PARAMS, tx.init(PARAMS), X)


def test_refuses_integers_by_name() -> None:
    params = dict(PARAMS, steps=jnp.arange(3))
    tx = galore()
    with pytest.raises(TypeError, match="'steps' is int32"):
        value_and_projected_grad(loss, tx)(params, tx.init(params), X)


def test_explains_by_leaf() -> None:
    def penalised(params: Any, x: Any) -> Any:
        return loss(params, x) + jnp.sum(params["v"] ** 2)

    params = dict(PARAMS, unused=PARAMS["w"])
    found = explain(
        penalised, galore(), params, jax.ShapeDtypeStruct((5, 6), jnp.float32)
    )
    unused, v, w = found
    assert [use.primitive for use in v.formed] == ["integer_pow"]
    assert "test_calls.py:" in v.formed[0].place
    assert (w.formed, w.products, unused.products) == ((), 1, 0)
    tokens, dense = 5, 2 * 5 * 6 * 10
    assert (v.flops, w.flops, unused.flops) == (dense, dense, 0)
    assert w.flops_in_coordinates == 2 * tokens * RANK * (6 + 10)
    assert found.flops == 2 * dense
    assert "unused  zero: not used" in str(found)
    assert "v: formed for integer_pow, " in str(found)


def test_counts_every_turn_of_a_scan() -> None:
    params = normals(1, w=(3, 6, 6))["w"]
    tx = galore(weight_dimension_numbers=MuonDimensionNumbers(1, 2))

    def scanned(params: Any, x: Any) -> Any:
        return jnp.sum(lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0])

    (leaf,) = explain(scanned, tx, params, X)
    assert (leaf.products, leaf.flops) == (3, 3 * 2 * 5 * 6 * 6)
    assert leaf.flops_in_coordinates == 3 * 2 * 5 * RANK * 12
