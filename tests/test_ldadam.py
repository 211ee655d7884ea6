# SPDX-License-Identifier: Apache-2.0
"""LDAdam: its bases, its rotation and its errors, against the formulas."""

import dataclasses
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
from galore_optax.subspace._base import matmul, orthonormalise
from tests.helpers import Tilted, tilted
from tests.layered import MODEL, assert_close, batches, loss_of, parameters
from tests.oracles import LDAdam
from tests.test_at_refresh import AXES, GRADIENTS, LR, PARAMS, RANK, matrices
from tests.test_residual import WHOLE

RATES = {"b1": 0.9, "b2": 0.99}


@dataclasses.dataclass(frozen=True)
class OneStep:
    """One block power iteration from the basis in use, after the first."""

    orthonormal: bool = True

    def basis(self, gradient: Any, previous: Any, key: Any, cold: Any) -> Any:
        first = Tilted().basis(gradient, previous, key, cold)
        square = matmul(gradient, matmul(gradient.T, previous))
        return jnp.where(cold, first, orthonormalise(square))


class Powers:
    """`OneStep` in NumPy."""

    def __init__(self) -> None:
        self.basis: Any = None

    def __call__(self, gradient: np.ndarray, rank: int) -> np.ndarray:
        if self.basis is None:
            self.basis = tilted(gradient, rank)
            return self.basis
        q, r = np.linalg.qr(gradient @ gradient.T @ self.basis)
        self.basis = q * np.where(np.diagonal(r) < 0, -1, 1)
        return self.basis


def make(subspace: Any = None, **chosen: Any) -> Any:
    options = {"rank": RANK, "weight_dimension_numbers": AXES} | RATES
    return go.ldadam(LR, subspace=subspace or Tilted(), **options | chosen)


def ran(tx: Any, dtype: Any = jnp.float32) -> tuple[Any, Any]:
    """The updates of each step, and the last state."""

    def step(state: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, state, params)
        return state, updates

    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    stacked = jax.tree.map(lambda *x: jnp.stack(x).astype(dtype), *GRADIENTS)
    state, found = jax.jit(lambda s, g: jax.lax.scan(step, s, g))(
        tx.init(params), stacked
    )
    return found, state


def assert_follows(tx: Any, bases: Any, dtype: Any, bound: float, **chosen: Any) -> Any:
    found, state = ran(tx, dtype)
    oracles = [LDAdam(RANK, 1, bases(), **RATES, **chosen) for _ in range(3)]
    for step, gradient in enumerate(GRADIENTS):
        ours = matrices(jax.tree.map(lambda x, step=step: x[step], found))
        for oracle, one, G in zip(oracles, ours, matrices(gradient), strict=True):
            expected = -LR * oracle.direction(G)
            error = np.linalg.norm(one - expected) / np.linalg.norm(expected)
            assert error < bound, step
    return oracles, state[0]


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
def test_follows_the_formulas(proj_type: Any) -> None:
    """A basis a step, of a matrix and of a stack of two."""
    tx = make(proj_type=proj_type)
    sides = {"left": proj_type != "right", "right": proj_type != "left"}
    oracles, state = assert_follows(tx, lambda: tilted, jnp.float32, 1e-5, **sides)
    for oracle, error in zip(oracles, matrices(state.error), strict=True):
        np.testing.assert_allclose(error, oracle.e, atol=1e-5 * np.max(np.abs(error)))


def test_without_feedback_nothing_is_remembered_of_errors() -> None:
    tx = make(error_feedback=False)
    _, state = assert_follows(tx, lambda: tilted, jnp.float32, 1e-5, feedback=False)
    assert state.error == ()


def test_the_published_power_step() -> None:
    """In f64: its square of the gradient amplifies what f32 rounds."""
    with jax.enable_x64(True):
        assert_follows(make(OneStep()), Powers, jnp.float64, 1e-8)


def test_nothing_of_the_gradient_is_lost() -> None:
    """Momentum without decay and what is fed back are all gradients so far."""
    tx = make(b1=0.5)
    _, state = ran(tx)
    low = state[0].galore
    P, M = np.float64(low.projector["wide"]), np.float64(low.inner_state.mu["wide"])
    # e + b1/(1-b1) P M is what is still to be applied, of which a step applies half.
    owed, total = 0.0, 0.0
    oracle = LDAdam(RANK, 1, tilted, b1=0.5, b2=0.99)
    for gradient in GRADIENTS:
        G = matrices(gradient)[0]
        oracle.direction(G)
        owed = owed + G
        total = total + oracle.P[0] @ oracle.M
        owed_now = oracle.e + oracle.P[0] @ oracle.M
        np.testing.assert_allclose(owed - total, owed_now, atol=1e-8)
    found = np.float64(state[0].error["wide"]) + P @ M
    np.testing.assert_allclose(found, owed_now, atol=1e-4)


def test_state_is_galores_and_a_leaf() -> None:
    m, n, layers = 16, 40, 3
    params = {
        "up": jax.ShapeDtypeStruct((layers, m, n), jnp.float32),
        "bias": jax.ShapeDtypeStruct((n,), jnp.float32),
    }
    axes = {"up": MuonDimensionNumbers(1, 2), "bias": None}
    options = {"rank": RANK, "weight_dimension_numbers": axes}

    def size(tx: Any) -> int:
        return tree_bytes(jax.eval_shape(tx.init, params))

    numbers = m * RANK + 2 * n * RANK + 2
    plain = 4 * (layers * numbers + 2 * n + 4)
    assert size(go.ldadam(LR, error_feedback=False, **options)) == plain
    assert size(go.ldadam(LR, **options)) == plain + 4 * layers * m * n


def test_sixteen_bits() -> None:
    """Errors are stored as their leaves are."""
    found, state = ran(make(), jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves((found, state[0].error))} == {
        jnp.dtype(jnp.bfloat16)
    }


@pytest.mark.parametrize("way", WHOLE)
def test_coordinates_alone_are_refused(way: str) -> None:
    params = {"wide": jnp.zeros((9, 14)), "heads": jnp.zeros((8, 2, 3, 5))}
    tx = go.ldadam(LR, rank=RANK, weight_dimension_numbers=None)
    with pytest.raises(ValueError, match="whole gradients"):
        WHOLE[way](tx, tx.init(params))


def test_layer_by_layer() -> None:
    """Errors of all layers would be held; without them it is as the plain step."""
    with pytest.raises(ValueError, match="error_feedback"):
        layerwise.make_step(MODEL, go.ldadam(LR, rank=RANK)).init(parameters())
    # Gradients of 1e-2 are off by roundings of a hundred terms, 1e-8, and updates by
    # 1e-8 / eps of the rate a step; weights below 1 are rounded in each.
    tx = go.ldadam(LR, rank=RANK, subspace=Tilted(), eps=1e-3, error_feedback=False)
    step = layerwise.make_step(MODEL, tx)
    params = whole = parameters()
    state, whole_state = step.init(params), tx.init(whole)
    update = jax.jit(step.update)
    for number in range(3):
        data = batches(number, 1)
        params, state, _ = update(params, state, data)
        gradients = jax.grad(lambda p, x=data: loss_of(MODEL, p, x[0]))(whole)
        updates, whole_state = tx.update(gradients, whole_state, whole)
        whole = optax.apply_updates(whole, updates)
    assert_close(params, whole, 3 * (1e-5 * LR + 2 * 2**-25))


REFUSED = {
    "no bool": (lambda: go.ldadam(LR, error_feedback=1), "error_feedback"),
    "no rotation": (
        lambda: go.ldadam(LR, subspace=go.subspace.gaussian()),
        "orthonormal",
    ),
    "no projection to feed back": (
        lambda: go.ldadam(
            LR, subspace=go.subspace.gaussian(), moments=go.moments.transfer()
        ),
        "error_feedback",
    ),
    "a state of galore": (
        lambda: make().update(
            PARAMS,
            go.galore_adamw(LR, rank=RANK, weight_dimension_numbers=AXES).init(PARAMS),
            PARAMS,
        ),
        "init",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused(what: str) -> None:
    make_it, words = REFUSED[what]
    with pytest.raises((ValueError, TypeError), match=words):
        make_it()
