# SPDX-License-Identifier: Apache-2.0
"""Fira: the residual, its scaling by columns, its limiter."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import galore_optax as go
from galore_optax import layerwise
from galore_optax._asking.held import tree_bytes
from tests.helpers import Tilted, normal, normal_like, tilted
from tests.layered import MODEL, assert_close, batches, loss_of, parameters
from tests.oracles import Fira, Raw

LR, RANK, GAP, STEPS, SCALE, DECAY = 0.01, 4, 10, 30, 0.25, 0.1
# Optax' bias correction, 1 - b2ᵗ in f32, is off by 2⁻²⁴ / (1 - b2) in the first step.
RATES = {"b1": 0.9, "b2": 0.99}
PARAMS = {"wide": normal(1, (9, 14)), "heads": normal(2, (8, 2, 3, 5))}
# Of "heads" the second axis counts matrices, and the last two are one side.
AXES = {
    "wide": MuonDimensionNumbers(1, 0),
    "heads": MuonDimensionNumbers(0, (2, 3)),
}
OPTIONS = {
    "rank": RANK,
    "update_proj_gap": GAP,
    "subspace": Tilted(),
    "weight_dimension_numbers": AXES,
}


def gradients(step: int) -> Any:
    """Of sizes that make the limiter work on some steps."""
    return jax.tree.map(lambda x: x * 1.5 ** (step % 4), normal_like(PARAMS, step))


def matrices(tree: Any) -> list[np.ndarray]:
    """Rows first."""
    heads = np.float64(tree["heads"])
    return [
        np.float64(tree["wide"]),
        *(heads[:, i].reshape(8, 15).T for i in range(2)),
    ]


@functools.cache
def ran(steps: int = STEPS, **chosen: Any) -> list[Any]:
    """Parameters before each step and after the last, and the last state."""
    tx = go.fira_adamw(LR, weight_decay=DECAY, **RATES, **OPTIONS | chosen)
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    found = [params]
    for step in range(steps):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return [*found, state]


@pytest.mark.parametrize("definition", ["orthogonal", "scaled"])
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_follows_the_formulas(definition: Any, proj_type: Any) -> None:
    *found, state = ran(proj_type=proj_type, definition=definition)
    left = proj_type == "left"
    kept = {"orthogonal": 1.0, "scaled": SCALE}[definition]
    oracles = [
        Fira(RANK, GAP, tilted, left, not left, kept=kept, **RATES) for _ in range(3)
    ]
    for step in range(STEPS):
        three = (matrices(x) for x in (found[step], found[step + 1], gradients(step)))
        for oracle, W, after, G in zip(oracles, *three, strict=True):
            expected = W - LR * (oracle.direction(G) + DECAY * W)
            # Updates, to 1e-5, and what f32 rounds of the weights.
            np.testing.assert_allclose(
                after, expected, atol=1e-5 * np.max(np.abs(expected - W)) + 4 * 2**-24
            )
    assert all(3 < oracle.limits < STEPS - 3 for oracle in oracles)
    norms = [float(state[0].residual["wide"]), *map(float, state[0].residual["heads"])]
    np.testing.assert_allclose(norms, [x.before for x in oracles], rtol=1e-4)


@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_the_raw_residual_follows_its_formula(proj_type: Any) -> None:
    """Three refreshes, of a matrix and of a stack of two."""
    options = OPTIONS | {"proj_type": proj_type, "residual": go.residual.raw()}
    tx = go.galore(optax.scale_by_adam(**RATES), **options)
    left = proj_type == "left"
    oracles = [Raw(RANK, GAP, tilted, left, not left, **RATES) for _ in range(3)]
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for step in range(STEPS):
        updates, state = update(gradients(step), state, PARAMS)
        both = matrices(updates), matrices(gradients(step))
        for oracle, found, G in zip(oracles, *both, strict=True):
            expected = oracle.direction(G)
            error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
            assert error < 1e-5, step


def test_without_a_limit_no_step_depends_on_the_last() -> None:
    *found, _ = ran(steps=3, gamma=math.inf)
    oracle = Fira(RANK, GAP, tilted, gamma=math.inf, **RATES)
    for step in range(3):
        W, after, G = (
            matrices(x)[0] for x in (found[step], found[step + 1], gradients(step))
        )
        expected = W - LR * (oracle.direction(G) + DECAY * W)
        np.testing.assert_allclose(after, expected, atol=1e-6)
    assert oracle.limits == 0


def test_a_gradient_of_zero_does_not_end_the_residual() -> None:
    tx = go.fira_adamw(1.0, **OPTIONS)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    _, state = update(gradients(0), state, PARAMS)
    _, state = update(jax.tree.map(jnp.zeros_like, PARAMS), state, PARAMS)
    assert float(state[0].residual["wide"]) == 0
    _, state = update(gradients(1), state, PARAMS)
    assert float(state[0].residual["wide"]) > 1


def test_state_is_galores_and_a_number_a_matrix() -> None:
    def size(tx: Any) -> int:
        return tree_bytes(jax.eval_shape(tx.init, params))

    m, n, layers = 16, 40, 3
    params = {"up": jax.ShapeDtypeStruct((layers, m, n), jnp.float32)}
    axes = {"up": MuonDimensionNumbers(1, 2)}
    chosen = {"rank": RANK, "weight_dimension_numbers": axes}
    fira, galore = (
        size(make(LR, **chosen)) for make in (go.fira_adamw, go.galore_adamw)
    )
    assert fira - galore == 4 * layers
    # m r + 2 n r + 1 numbers, two counters of refreshes; a key, a count and Adam's.
    numbers = m * RANK + 2 * n * RANK + 1
    assert fira == 4 * layers * (numbers + 2) + 8 + 4 + 4


def test_sixteen_bits() -> None:
    """Accumulated in f32, and rounded once where it is added."""
    params, grads = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), (PARAMS, gradients(0))
    )
    tx = go.fira_adamw(1.0, projector_dtype=jnp.float32, **OPTIONS)
    found, state = tx.update(grads, tx.init(params), params)
    wide = jax.tree.map(jnp.float32, (params, grads))
    expected, _ = tx.update(wide[1], tx.init(wide[0]), wide[0])
    assert state[0].residual["wide"].dtype == jnp.float32
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        # Two addends and their sum, near 4, each rounded to eight bits.
        np.testing.assert_allclose(np.float32(one), other, atol=3 * 4 * 2**-8)


WHOLE = {
    "project_gradients": lambda tx, state: go.project_gradients(
        tx, PARAMS, state, PARAMS
    ),
    "update_projected": lambda tx, state: go.update_projected(
        tx, PARAMS, state, PARAMS
    ),
    "value_and_projected_grad": lambda tx, state: go.value_and_projected_grad(
        lambda x: jnp.sum(x["wide"]), tx
    )(PARAMS, state),
}


@pytest.mark.parametrize("way", WHOLE)
def test_coordinates_alone_are_refused(way: str) -> None:
    tx = go.fira_adamw(LR, **OPTIONS)
    with pytest.raises(ValueError, match="whole gradients"):
        WHOLE[way](tx, tx.init(PARAMS))


def test_layer_by_layer() -> None:
    """One micro-batch gives whole gradients, several give coordinates."""
    # Gradients of 1e-2 are off by roundings of a hundred terms, 1e-8, and updates by
    # 1e-8 / eps of the rate a step.
    options = {"rank": RANK, "update_proj_gap": 2, "subspace": Tilted()}
    tx = go.fira_adamw(LR, eps=1e-3, **options)
    step = layerwise.make_step(MODEL, tx)
    params = whole = parameters()
    state, whole_state = step.init(params), tx.init(whole)

    @jax.jit
    def plain(params: Any, state: Any, data: Any) -> Any:
        grads = jax.grad(lambda p: loss_of(MODEL, p, data[0]))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    update = jax.jit(step.update)
    for number in range(4):
        data = batches(number, 1)
        params, state, _ = update(params, state, data)
        whole, whole_state = plain(whole, whole_state, data)
    assert_close(params, whole, 4 * 1e-5 * LR)
    with pytest.raises(ValueError, match="whole gradients"):
        step.update(params, state, batches(0, 2))


FIRA = go.residual.fira()
REFUSED = {
    "both sides": (lambda: go.fira_adamw(LR, proj_type="full", **OPTIONS), "full"),
    "no residual": (
        lambda: go.galore(optax.scale_by_adam(), residual=go.residual.fira),
        "residual",
    ),
    "gamma": (lambda: go.residual.fira(gamma=1.0), "gamma"),
    "definition": (lambda: go.residual.fira(definition="official"), "definition"),
    "no inner": (lambda: go.galore(residual=FIRA, **OPTIONS).init(PARAMS), "inner"),
    "a rate inside": (
        lambda: go.galore(optax.adamw(LR), residual=FIRA, **OPTIONS).init(PARAMS),
        "learning rate",
    ),
    "a schedule inside": (
        lambda: go.chain(
            go.galore(residual=FIRA, **OPTIONS),
            optax.adamw(optax.linear_schedule(0.0, LR, 10)),
        ).init(PARAMS),
        "learning rate",
    ),
    "inside galore": (
        lambda: go.galore(go.fira_adamw(LR, **OPTIONS), rank=4),
        "projects already",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused(what: str) -> None:
    make, words = REFUSED[what]
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_a_state_without_residual_is_named() -> None:
    tx, plain = (
        go.galore(optax.scale_by_adam(), residual=residual, **OPTIONS)
        for residual in (FIRA, None)
    )
    with pytest.raises(ValueError, match="residual"):
        jax.eval_shape(tx.update, PARAMS, plain.init(PARAMS), PARAMS)
