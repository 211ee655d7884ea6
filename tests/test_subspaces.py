# SPDX-License-Identifier: Apache-2.0
"""GoLore, SARA, the cosine transform, and Flora's transfer of moments."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from galore_optax import subspace
from tests.helpers import Tilted, normal, orthonormality, tilted, with_spectrum
from tests.oracles import Adam
from tests.test_apollo import drawn
from tests.test_at_refresh import (
    AXES,
    GAP,
    GRADIENTS,
    LR,
    PARAMS,
    RANK,
    RATES,
    STEPS,
    matrices,
)

LATE = 2 * GAP  # the last of three refreshes
METHODS = {
    "golore": subspace.golore(random_from=LATE, first=Tilted()),
    "sara": subspace.sara(),
    "dct": subspace.dct(),
    "gaussian": subspace.gaussian(),
}
# A cosine column that is new has moments of zero, and of 1e-7 in f32, beside which a
# small gradient of 1e-2 times 1 - b1 is no more than 1e-3.
EPS = {"dct": 1e-2}
RULES = {"transfer": go.moments.transfer(), "rotate": go.moments.rotate()}


def make(method: str, rule: str, inner: Any = None) -> Any:
    return go.galore(
        inner or optax.adam(LR, eps=EPS.get(method, 1e-8), **RATES),
        rank=RANK,
        update_proj_gap=GAP,
        subspace=METHODS[method],
        moments=RULES[rule],
        weight_dimension_numbers=AXES,
    )


def ran(tx: Any) -> tuple[Any, Any]:
    """The projectors and the updates of each step."""

    def step(state: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, state, PARAMS)
        return state, (state.projector, updates)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADIENTS)
    run = jax.jit(lambda s, g: jax.lax.scan(step, s, g)[1])
    return run(tx.init(PARAMS), stacked)


def cosines(numbers: np.ndarray, size: int) -> np.ndarray:
    """(size, numbers): columns of the discrete cosine transform."""
    i, k = np.arange(size)[:, None], np.asarray(numbers)[None]
    lengths = np.sqrt(np.where(k == 0, 1, 2) / size)
    return lengths * np.cos(np.pi * (2 * i + 1) * k / (2 * size))


def most(G: np.ndarray, rank: int) -> np.ndarray:
    whole = cosines(np.arange(len(G)), len(G))
    energy = np.sum((whole.T @ G) ** 2, axis=1)
    return whole[:, np.sort(np.argsort(energy)[-rank:])]


def found_basis(method: str, step: int, stored: Any, G: np.ndarray) -> np.ndarray:
    """That of the formulas; where it is drawn, what was found, after a check."""
    if method == "dct":
        return most(G, RANK)
    if method == "gaussian":
        return drawn(stored, len(G))
    if method == "golore" and step < LATE:
        return tilted(G, RANK)
    P = np.float64(stored)
    assert orthonormality(P) < 1e-5
    if method == "sara":
        products = np.abs(np.linalg.svd(G)[0].T @ P)
        assert sorted(np.argmax(products, 0)) == list(np.argmax(products, 0))
        np.testing.assert_allclose(np.max(products, 0), 1, atol=1e-4)
    return P


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        ("golore", "transfer"),
        ("sara", "rotate"),
        ("dct", "rotate"),
        ("gaussian", "transfer"),
    ],
)
def test_follows_the_formulas(method: str, rule: str) -> None:
    """Three refreshes, of a matrix and of a stack of two."""
    projectors, updates = ran(make(method, rule))
    now: list[Any] = []
    oracles = [
        Adam(
            RANK,
            GAP,
            lambda G, _, number=number: found_basis(method, now[0], now[1][number], G),
            moments=rule,
            eps=EPS.get(method, 1e-8),
            **RATES,
        )
        for number in range(3)
    ]
    for step, gradient in enumerate(GRADIENTS):
        stored, ours = (
            jax.tree.map(lambda x, step=step: x[step], tree)
            for tree in (projectors, updates)
        )
        now[:] = [step, [stored["wide"], *stored["stack"]]]
        sides = zip(oracles, matrices(ours), matrices(gradient), strict=True)
        for oracle, one, G in sides:
            expected = -LR * oracle.direction(G)
            error = np.linalg.norm(one - expected) / np.linalg.norm(expected)
            assert error < 1e-5, step


def test_flora() -> None:
    """A momentum transferred between Gaussian bases, with no second moment."""
    inner = optax.ema(0.9, debias=False)
    projectors, updates = ran(make("gaussian", "transfer", inner))
    M, A = 0.0, None
    for step in range(STEPS):
        G, before = matrices(GRADIENTS[step])[0], A
        A = drawn(projectors["wide"][step], len(G))
        if step and step % GAP == 0:
            M = A.T @ before @ M
        M = 0.9 * M + 0.1 * A.T @ G
        expected = 0.25 * A @ M
        error = updates["wide"][step] - expected
        assert np.linalg.norm(error) < 1e-5 * np.linalg.norm(expected)


def basis(method: Any, gradient: Any, rank: int, key: int = 0) -> np.ndarray:
    previous = jnp.eye(len(gradient), rank)
    given = jnp.asarray(gradient, jnp.float32), previous, jax.random.PRNGKey(key)
    return np.asarray(method.basis(*given, jnp.bool_(True)))


def test_sara_draws_by_singular_values() -> None:
    values = np.array([4.0, 2.0, 1.0, 1.0, 0.0])
    gradient = with_spectrum(0, (5, 7), values)
    keys = jax.random.split(jax.random.PRNGKey(1), 4000)
    given = jnp.asarray(gradient, jnp.float32), jnp.eye(5, 1)
    draw = jax.vmap(lambda key: subspace.sara().basis(*given, key, jnp.bool_(True)))
    drawn_first = np.argmax(
        np.abs(np.linalg.svd(gradient)[0].T @ np.asarray(draw(keys))[..., 0].T), 0
    )
    counts = np.bincount(drawn_first, minlength=5)
    # Vectors of equal values are any of their plane.
    shares = [counts[0], counts[1], counts[2] + counts[3], counts[4]]
    expected = np.array([0.5, 0.25, 0.25, 0.0])
    # Standard deviations of at most 1 / (2 sqrt(4000)).
    np.testing.assert_allclose(np.array(shares) / 4000, expected, atol=0.04)


def test_sara_takes_everything_where_the_rank_allows() -> None:
    gradient = with_spectrum(0, (5, 7), np.arange(1.0, 6))
    P = basis(subspace.sara(), gradient, 5)
    np.testing.assert_allclose(P @ P.T, np.eye(5), atol=1e-5)


@pytest.mark.parametrize("step", [LATE - 1, LATE])
def test_golore_changes_where_it_was_told_to(step: int) -> None:
    method = METHODS["golore"]
    given = jnp.eye(9, RANK), jax.random.PRNGKey(0), jnp.bool_(False)
    one, other = (
        method.basis_at(jnp.int32(step), normal(seed, (9, 14)), *given)
        for seed in (1, 2)
    )
    assert bool(jnp.all(one == other)) == (step == LATE)


@pytest.mark.parametrize("size", [9, 4096, 70_001])
def test_columns_of_the_cosine_transform(size: int) -> None:
    numbers = np.array([0, 1, size // 3, size - 2, size - 1])
    with jax.enable_x64(True):
        given = jnp.asarray(numbers, jnp.uint32)
        columns = subspace.dct().columns(given, size, jnp.float64)
    # NumPy's own phases are off by eps times the phase, pi size.
    eps = 2**-52 * np.pi * size
    np.testing.assert_allclose(columns, cosines(numbers, size), atol=eps)


def test_what_is_shared_by_two_cosine_bases_is_carried_over() -> None:
    """In the place that it has in the new one; the rest begins anew."""
    low, high = (cosines(np.arange(k, k + 3), 6) for k in (0, 1))
    tx = go.galore(
        optax.sgd(1.0, momentum=1.0),
        rank=3,
        scale=1.0,
        update_proj_gap=1,
        subspace=subspace.dct(),
        moments=RULES["rotate"],
    )
    params = {"w": jnp.zeros((6, 8))}
    first, second = normal(0, (3, 8)), normal(1, (3, 8))
    _, state = tx.update({"w": low @ first}, tx.init(params))
    updates, state = tx.update({"w": high @ second}, state)
    assert state.projector["w"].tolist() == [[1, 2, 3]]
    carried = np.concatenate([np.asarray(first[1:]), np.zeros((1, 8))])
    np.testing.assert_allclose(updates["w"], -high @ (carried + second), atol=1e-5)


REFUSED = {
    "a step": (lambda: subspace.golore(random_from=0), "random_from"),
    "a first that is not orthonormal": (
        lambda: subspace.golore(random_from=5, first=subspace.gaussian()),
        "orthonormal",
    ),
    "a dtype of indices": (
        lambda: go.galore(
            optax.adam(LR), subspace=subspace.dct(), projector_dtype="int8"
        ),
        "projector_dtype",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused(what: str) -> None:
    make_it, words = REFUSED[what]
    with pytest.raises(ValueError, match=words):
        make_it()


@functools.cache
def sizes(method: str) -> int:
    tx = go.galore(optax.sgd(LR), rank=4, subspace=METHODS[method])
    shapes = jax.eval_shape(tx.init, {"w": jnp.zeros((16, 40))})
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes.projector))


def test_bytes_of_projectors() -> None:
    assert {name: sizes(name) for name in METHODS} == {
        "golore": 4 * 16 * 4,
        "sara": 4 * 16 * 4,
        "dct": 4 * 4,
        "gaussian": 4 * 4,
    }
