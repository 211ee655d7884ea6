# SPDX-License-Identifier: Apache-2.0
"""Moments at a refresh: kept, reset, rotated; and the signs of new columns."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import galore_optax as go
from galore_optax import layerwise
from tests.helpers import Tilted, normal, normal_like, tilted
from tests.layered import (
    MODEL,
    assert_close,
    batches,
    parameters,
    plain_step,
)
from tests.oracles import Adam

LR, RANK, GAP, STEPS = 0.01, 4, 10, 30
# Optax' bias correction, 1 - b2ᵗ in f32, is off by 2⁻²⁴ / (1 - b2) in the first step.
RATES = {"b1": 0.9, "b2": 0.99}
RULES = {
    "keep": go.moments.keep(),
    "keep, signs aligned": go.moments.keep(align_signs=True),
    "reset": go.moments.reset(),
    "rotate": go.moments.rotate(),
}
PARAMS = {"wide": jnp.zeros((9, 14)), "stack": jnp.zeros((8, 2, 12))}
# As they are named: of "stack" the middle axis counts matrices.
AXES = {"wide": MuonDimensionNumbers(1, 0), "stack": MuonDimensionNumbers(2, 0)}
SIDES = {"left": (True, False), "right": (False, True), "full": (True, True)}


@dataclasses.dataclass(frozen=True)
class Flipping:
    """`Tilted`, its columns with signs as arbitrary as those of singular vectors."""

    orthonormal: bool = True

    def basis(self, gradient: Any, previous: Any, key: Any, cold: Any) -> Any:
        basis = Tilted().basis(gradient, previous, key, cold)
        return basis * jnp.sign(gradient[0, : basis.shape[1]])


def flipping(gradient: np.ndarray, rank: int) -> np.ndarray:
    return tilted(gradient, rank) * np.sign(gradient[0, :rank])


def make(rule: str, inner: Any = None, **chosen: Any) -> Any:
    options = {"rank": RANK, "update_proj_gap": GAP, "subspace": Flipping()} | chosen
    options = {"weight_dimension_numbers": AXES} | options
    return go.galore(inner or INNERS["plain"](), moments=RULES[rule], **options)


def drift(step: int) -> Any:
    """Gradients with a mean that moments remember."""
    parts = normal_like(PARAMS, 1000), normal_like(PARAMS, step)
    return jax.tree.map(lambda mean, noise: mean + noise, *parts)


GRADIENTS = [drift(step) for step in range(STEPS)]


@functools.cache
def ran(rule: str, inner: str = "plain", **chosen: Any) -> Any:
    """The last state, and the updates of each step."""
    tx = make(rule, INNERS[inner](), **chosen)

    def step(state: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, state, PARAMS)
        return state, updates

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADIENTS)
    return jax.jit(lambda s, g: jax.lax.scan(step, s, g))(tx.init(PARAMS), stacked)


def injected() -> optax.GradientTransformation:
    """Its decays in the state, behind clipping and a mask."""
    adam = optax.inject_hyperparams(optax.adam)(LR, **RATES)
    return optax.chain(optax.clip_by_global_norm(1e3), optax.masked(adam, True))


INNERS = {
    "plain": lambda: optax.adam(LR, **RATES),
    "coded": lambda: go.quantized(
        optax.adam(LR, **RATES), code=go.codes.companded(min_size=16)
    ),
    "injected": injected,
}


def matrices(tree: Any) -> list[np.ndarray]:
    stack = np.float64(tree["stack"])
    return [np.float64(tree["wide"]), stack[..., 0, :], stack[..., 1, :]]


@pytest.mark.parametrize(
    ("rule", "proj_type", "inner"),
    [
        ("keep", "left", "plain"),
        ("keep, signs aligned", "left", "plain"),
        ("keep, signs aligned", "full", "plain"),
        ("reset", "left", "plain"),
        ("rotate", "left", "plain"),
        ("rotate", "right", "plain"),
        ("rotate", "full", "plain"),
        ("rotate", "left", "injected"),
    ],
)
def test_follows_the_formulas(rule: str, proj_type: Any, inner: str) -> None:
    """Three refreshes, of a matrix and of a stack of two."""
    _, found = ran(rule, inner, proj_type=proj_type)
    left, right = SIDES[proj_type]
    oracles = [
        Adam(RANK, GAP, flipping, left, right, moments=rule, **RATES) for _ in range(3)
    ]
    for step, gradient in enumerate(GRADIENTS):
        ours = matrices(jax.tree.map(lambda x, step=step: x[step], found))
        for oracle, one, G in zip(oracles, ours, matrices(gradient), strict=True):
            expected = -LR * oracle.direction(G)
            error = np.linalg.norm(one - expected) / np.linalg.norm(expected)
            assert error < 1e-5, step


@pytest.mark.parametrize("rule", ["reset", "rotate"])
def test_only_matrices_that_took_a_basis_change(rule: str) -> None:
    """Staggered, one of three a step; and none where the gradient is zero."""
    options = {"stagger": True, "update_proj_gap": 3}
    tx = make(rule, optax.sgd(1.0, momentum=1.0), **options)
    update = jax.jit(tx.update)
    _, state = update(GRADIENTS[0], tx.init(PARAMS), PARAMS)
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)
    _, same = update(nothing, state, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, trace(same), trace(state))
    for gradient in GRADIENTS[1:4]:
        _, after = update(gradient, state, PARAMS)
        taken = [x != y for x, y in zip(lasts(state), lasts(after), strict=True)]
        assert sum(taken) == 1
        low, _ = go.project_gradients(tx, gradient, after, PARAMS, refresh=False)
        carried = optax.tree.sub(trace(after), low)
        kept = [
            np.allclose(x, y, rtol=0, atol=1e-5)
            for x, y in zip(matrices(carried), matrices(trace(state)), strict=True)
        ]
        assert kept == [not x for x in taken]
        state = after


def trace(state: Any) -> Any:
    return state.inner_state[0].trace


def lasts(state: Any) -> list[int]:
    last = state.refresh.last
    return [int(last["wide"]), *map(int, last["stack"])]


@pytest.mark.parametrize("rule", ["reset", "rotate"])
def test_coded_moments_follow(rule: str) -> None:
    (_, found), (_, expected) = (
        ran(rule, inner, proj_type="left") for inner in ("coded", "plain")
    )
    # A code is off by 1 / 127 of a block's largest first moment, and so is an update,
    # of the learning rate, for the 1 / (1 - b1) steps that a moment remembers.
    for one, other in zip(matrices(found), matrices(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=10 / 127 * LR)


def apart(one: Any, other: Any) -> Any:
    return optax.tree.norm(optax.tree.sub(one, other)) / optax.tree.norm(other)


def test_signs_of_columns_are_nothing_to_rotation() -> None:
    def flips(rule: str) -> Any:
        plain, flipped = (
            ran(rule, proj_type="left", **chosen)
            for chosen in ({"subspace": Tilted()}, {})
        )
        return apart(flipped[1], plain[1])

    assert flips("rotate") < 1e-5
    assert flips("keep") > 0.1


def test_aligned_columns_have_the_nearest_signs() -> None:
    aligned, _ = ran("keep, signs aligned", proj_type="left")
    expected, _ = ran("keep", proj_type="left", subspace=Tilted())
    assert apart(aligned.projector, expected.projector) < 1e-5
    assert apart(aligned.inner_state[0].mu, expected.inner_state[0].mu) < 1e-5


@pytest.mark.parametrize(
    ("rule", "method"),
    [("keep, signs aligned", "power"), ("reset", "svd"), ("rotate", "power")],
)
def test_gradients_never_formed_give_the_same(rule: str, method: str) -> None:
    """The moments move where the basis does, by passes and by a gradient."""

    def loss(params: Any, x: Any) -> Any:
        wide = jnp.tanh(x @ params["wide"])
        stacked = jnp.einsum("bi,ijk->bjk", x[:, :8], params["stack"])
        return jnp.mean(wide**2) + jnp.mean(jnp.sin(stacked))

    subspaces = {
        "power": go.subspace.power(product_dtype=jnp.float32),
        "svd": go.subspace.svd(),
    }
    with jax.enable_x64(True):
        tx = make(rule, subspace=subspaces[method], update_proj_gap=2)
        params = jax.tree.map(lambda x: jnp.float64(x + 0.3), GRADIENTS[1])
        x = normal(2, (16, 9), jnp.float64)

        def formed(params: Any, state: Any, x: Any) -> Any:
            return tx.update(jax.grad(loss)(params, x), state, params)

        def never(params: Any, state: Any, x: Any) -> Any:
            run = go.value_and_projected_grad(loss, tx)
            _, low, state = run(params, state, x)
            return go.update_projected(tx, low, state, params)

        start = tx.init(params)
        one, other = (params, start), (params, start)
        steps = jax.jit(formed), jax.jit(never)
        for number in range(5):
            one, other = (
                (optax.apply_updates(now[0], updates), state)
                for now, step in zip((one, other), steps, strict=True)
                for updates, state in [step(*now, (number + 1) * x)]
            )
        for a, b in zip(*map(jax.tree.leaves, (one[0], other[0])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("count", [1, 2])
def test_layer_by_layer(count: int) -> None:
    """One micro-batch, and several that add up coordinates."""
    # Gradients of 1e-2 are off by roundings of a hundred terms, 1e-8, updates by
    # 1e-8 / eps of the rate a step, and weights below 2 lie 1.2e-7 apart. With a
    # smaller eps, what differs would double from step to step.
    adam = optax.adam(LR, eps=1e-2)
    tx = make("rotate", adam, weight_dimension_numbers=None, update_proj_gap=2)
    step = layerwise.make_step(MODEL, tx)
    params = whole = parameters()
    state, whole_state = step.init(params), tx.init(whole)
    update, plain = jax.jit(step.update), plain_step(MODEL, tx)
    for number in range(5):
        data = batches(number, count)
        params, state, _ = update(params, state, data)
        whole, whole_state, _ = plain(whole, whole_state, data)
    assert_close(params, whole, 5 * (1e-6 * LR + 1.2e-7))


def test_lanes_of_a_vmap_move_alone() -> None:
    tx, drifts = make("rotate", update_proj_gap=2), GRADIENTS
    states = [tx.init(PARAMS)]
    update = jax.jit(tx.update)
    states.append(update(drifts[0], states[0], PARAMS)[1])
    states[0] = update(drifts[1], update(drifts[2], states[0], PARAMS)[1], PARAMS)[1]
    both = jax.tree.map(lambda *x: jnp.stack(x), *states)
    lanes = jax.jit(jax.vmap(lambda s: tx.update(drifts[3], s, PARAMS)))(both)
    for number, state in enumerate(states):  # the first is due, the second is not
        expected = update(drifts[3], state, PARAMS)
        found = jax.tree.map(lambda x, number=number: x[number], lanes)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_basis_that_is_no_rotation_is_refused() -> None:
    with pytest.raises(ValueError, match="orthonormal"):
        make("rotate", subspace=go.subspace.random(orthonormal=False))


@pytest.mark.parametrize(
    ("rule", "inner", "words"),
    [
        ("rotate", lambda: optax.adafactor(LR, min_dim_size_to_factor=2), "v_row"),
        ("rotate", lambda: optax.rprop(LR), "step_sizes"),
        ("reset", lambda: optax.adafactor(LR, min_dim_size_to_factor=2), "stack"),
        (
            "rotate",
            lambda: optax.chain(optax.adam(LR), optax.contrib.reduce_on_plateau()),
            "extra arguments",
        ),
    ],
)
def test_what_cannot_be_moved_is_named(rule: str, inner: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(rule, inner()).init(PARAMS)


def test_decays_that_are_injected_around_galore() -> None:
    """They reach the update, and not what is asked before it."""
    factory = go.inject_hyperparams(go.galore_adamw)
    options = {"rank": RANK, "update_proj_gap": 1, "subspace": Flipping()}
    options |= {"weight_dimension_numbers": AXES, "moments": RULES["rotate"]}
    txs = factory(LR, **RATES, **options), go.galore_adamw(LR, **RATES, **options)
    found = []
    for tx in txs:
        state = tx.init(PARAMS)
        for gradient in GRADIENTS[:2]:
            updates, state = tx.update(gradient, state, PARAMS)
        found.append(updates)
    assert apart(*found) < 1e-5
    with pytest.raises(ValueError, match="inject"):
        go.project_gradients(
            txs[0], GRADIENTS[0], txs[0].init(PARAMS), PARAMS, refresh=True
        )


def test_what_is_no_rule_is_refused() -> None:
    for wrong in ("rotate", go.moments.rotate):
        with pytest.raises(TypeError, match="moments"):
            go.galore(optax.adam(LR, **RATES), rank=4, moments=wrong)  # type: ignore[arg-type]


def test_kept_moments_cost_nothing() -> None:
    """The program is that of before there were rules, which carries no moments."""
    tx = make("keep")
    text = str(jax.make_jaxpr(tx.update)(PARAMS, tx.init(PARAMS), PARAMS))
    moving = str(jax.make_jaxpr(make("reset").update)(PARAMS, tx.init(PARAMS), PARAMS))
    assert text.count("while") < moving.count("while")
