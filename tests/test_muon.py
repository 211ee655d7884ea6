# SPDX-License-Identifier: Apache-2.0
"""Orthogonalised momentum in the subspace, by hand and ready-made."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import galore_optax as go
from galore_optax._asking.held import tree_bytes
from tests.helpers import Tilted, normal_like, tilted
from tests.oracles import Muon, Sumo
from tests.test_at_refresh import GAP, GRADIENTS, PARAMS, RANK, matrices

LR = 0.01
# The middle axis of "stack" counts matrices.
AXES = {"wide": MuonDimensionNumbers(0, 1), "stack": MuonDimensionNumbers(2, 0)}
OPTIONS = {
    "rank": RANK,
    "update_proj_gap": GAP,
    "subspace": Tilted(),
    "weight_dimension_numbers": AXES,
}
# Five steps of Newton and Schulz amplify roundings by up to 3.4⁵, three by 40.
NS_STEPS = 3
# Of "wide", whose rows are inputs, and of the two of "stack", 8 outputs and 12 inputs.
FACTORS = [math.sqrt(14 / 9), 1.0, 1.0]


def ran(tx: Any) -> Any:
    def step(state: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, state, PARAMS)
        return state, updates

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADIENTS)
    return jax.jit(lambda s, g: jax.lax.scan(step, s, g)[1])(tx.init(PARAMS), stacked)


def assert_follow(found: Any, oracles: list[Muon]) -> None:
    for step, gradient in enumerate(GRADIENTS):
        ours = matrices(jax.tree.map(lambda x, step=step: x[step], found))
        gradients = matrices(gradient)
        for oracle, one, G in zip(oracles, ours, gradients, strict=False):
            expected = -LR * oracle.direction(G)
            error = np.linalg.norm(one - expected) / np.linalg.norm(expected)
            assert error < 1e-5, step


@pytest.mark.parametrize("rule", ["keep", "rotate"])
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_follows_the_formulas(proj_type: Any, rule: str) -> None:
    """Three refreshes, of a matrix and of a stack of two."""
    moments = {"keep": go.moments.keep(), "rotate": None}[rule]
    options = OPTIONS | {"proj_type": proj_type, "moments": moments}
    tx = go.galore_muon(LR, ns_steps=NS_STEPS, **options)
    left = proj_type == "left"
    # "wide" is written with its inputs as rows.
    sides = [left != (number == 0) for number in range(3)]
    oracles = [
        Muon(
            RANK,
            GAP,
            tilted,
            side,
            not side,
            rule,
            scale=1.0,
            factor=factor,
            steps=NS_STEPS,
        )
        for side, factor in zip(sides, FACTORS, strict=True)
    ]
    assert_follow(ran(tx), oracles)


def test_optaxs_own_as_the_inner() -> None:
    """Of a matrix of two axes; c goes by its coordinates then, (4, 14) of (9, 14)."""
    inner = optax.contrib.muon(LR, ns_steps=NS_STEPS)
    tx = go.galore(inner, scale=1.0, proj_type="std", **OPTIONS)
    factor = math.sqrt(14 / RANK)
    oracle = Muon(RANK, GAP, tilted, scale=1.0, factor=factor, steps=NS_STEPS)
    assert_follow(ran(tx), [oracle])


def test_sumo_is_its_parts() -> None:
    """Muon in the subspace, moments that rotate, and the residual as it is."""
    inner = optax.contrib.scale_by_muon(
        ns_steps=NS_STEPS,
        weight_dimension_numbers=lambda tree: jax.tree.map(
            lambda _: MuonDimensionNumbers(), tree
        ),
    )
    options = OPTIONS | {"weight_dimension_numbers": None}
    parts = {"moments": go.moments.rotate(), "residual": go.residual.raw()}
    tx = go.galore(inner, scale=1.0, proj_type="std", **options, **parts)
    oracle = Sumo(RANK, GAP, tilted, moments="rotate", scale=1.0, steps=NS_STEPS)
    params = {"wide": PARAMS["wide"]}
    state, update = tx.init(params), jax.jit(tx.update)
    for step, gradient in enumerate(GRADIENTS):
        found, state = update({"wide": gradient["wide"]}, state, params)
        expected = oracle.direction(np.float64(gradient["wide"]))
        error = np.linalg.norm(found["wide"] - expected) / np.linalg.norm(expected)
        assert error < 1e-5, step


def test_at_full_rank_it_is_muon() -> None:
    params = {"w": jnp.zeros((8, 12)), "stack": jnp.zeros((3, 12, 8))}
    axes = {"w": MuonDimensionNumbers(0, 1), "stack": MuonDimensionNumbers(1, 2)}
    arguments = {"weight_decay": 0.1, "consistent_rms": 0.2}
    options = {"rank": 8, "weight_dimension_numbers": axes, "update_proj_gap": 2}
    ours = go.galore_muon(LR, **options, **arguments)
    with pytest.warns(UserWarning, match="rank"):
        state = ours.init(params)
    plain = optax.contrib.muon(LR, muon_weight_dimension_numbers=axes, **arguments)
    expected_state = plain.init(params)
    update, expected_update = jax.jit(ours.update), jax.jit(plain.update)
    for step in range(5):
        gradients = normal_like(params, step)
        found, state = update(gradients, state, params)
        expected, expected_state = expected_update(gradients, expected_state, params)
        for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(one, other, atol=3.4445**5 * 2**-23 * LR)


def test_other_leaves_are_adamws() -> None:
    params = {
        "w": jnp.ones((8, 12)),
        "bias": jnp.ones(12),
        "embedding": jnp.ones((20, 8)),
    }
    tx = go.galore_muon(LR, adam_learning_rate=0.1, weight_decay=0.1, rank=4)
    adam = optax.adamw(0.1, weight_decay=0.1)
    state, plain = tx.init(params), adam.init(params)
    for step in range(2):
        gradients = normal_like(params, step)
        found, state = jax.jit(tx.update)(gradients, state, params)
        expected, plain = jax.jit(adam.update)(gradients, plain, params)
    for name in ("bias", "embedding"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_state_is_one_moment() -> None:
    m, n, layers = 16, 40, 3
    params = {"up": jax.ShapeDtypeStruct((layers, m, n), jnp.float32)}
    axes = {"up": MuonDimensionNumbers(1, 2)}
    tx = go.galore_muon(LR, rank=RANK, weight_dimension_numbers=axes)
    # And two counters of refreshes; a key, a count, Adam's and Muon's, with three
    # coefficients.
    numbers = layers * (m * RANK + n * RANK + 2) + 2 + 1 + 1 + 1 + 3
    assert tree_bytes(jax.eval_shape(tx.init, params)) == 4 * numbers
