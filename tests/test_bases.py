# SPDX-License-Identifier: Apache-2.0
"""What every subspace method finds, and which bases are refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.contrib import MuonDimensionNumbers

import galore_optax as go
from galore_optax import subspace
from galore_optax.subspace._base import basis_by_products
from tests.helpers import counters, normal, normal_like, orthonormality, with_spectrum

METHODS = {
    "svd": subspace.svd(),
    "eigh": subspace.eigh(),
    "randomized": subspace.randomized(),
    "power": subspace.power(),
    "random": subspace.random(),
    "golore": subspace.golore(random_from=2),
    "sara": subspace.sara(),
}
# A few hundred ulps of sums of 64 squares.
ORTHONORMAL = 2e-5


MODEL = {
    "layers": {
        "up": {"kernel": jnp.ones((3, 8, 12))},
        "norm": {"scale": jnp.ones((3, 8))},
    },
    "w": jnp.ones((8, 12)),
}


@functools.cache
def compiled_update(method: Any, rank: int, proj_type: str) -> Any:
    tx = go.galore(
        optax.sgd(0.1),
        rank=rank,
        subspace=method,
        proj_type=proj_type,
        weight_dimension_numbers=MuonDimensionNumbers(1, 0),
    )
    return tx.init, jax.jit(tx.update)


def refreshed(method: Any, gradient: Any, rank: int = 8, proj_type: str = "std") -> Any:
    init, update = compiled_update(method, rank, proj_type)
    params = {"w": jnp.zeros(gradient.shape, jnp.float32)}
    return update({"w": jnp.asarray(gradient)}, init(params), params)[1]


SPECTRA = {
    "flat": np.ones(32),
    "steep": np.arange(1, 33) ** -4.0,
    "deficient": np.r_[np.ones(4), np.zeros(28)],
    "one": np.r_[1.0, np.zeros(31)],
}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(32, 64), (64, 32)])
@pytest.mark.parametrize("method", METHODS)
def test_every_basis_is_orthonormal(
    method: str, shape: tuple[int, int], spectrum: str
) -> None:
    gradient = with_spectrum(0, shape, SPECTRA[spectrum]).astype(np.float32)
    for proj_type in ("std", "reverse_std"):
        state = refreshed(METHODS[method], gradient, proj_type=proj_type)
        assert orthonormality(state.projector["w"]) < ORTHONORMAL
        assert state.refresh.last["w"] == 0
        assert state.refresh.refused["w"] == 0


@pytest.mark.parametrize("method", ["power", "randomized", "random"])
@pytest.mark.parametrize("cold", [True, False])
def test_a_basis_by_products_is_that_of_the_gradient(method: str, cold: bool) -> None:
    found = METHODS[method] if method != "power" else subspace.power(product_dtype="f4")
    assert isinstance(found, subspace.ByProducts)
    gradient = with_spectrum(0, (24, 40), np.arange(1.0, 25) ** -1).astype(np.float32)
    given = jnp.eye(24, 4), jax.random.PRNGKey(3), jnp.bool_(cold)
    direct = found.basis(gradient / np.abs(gradient).max(), *given)
    by_products = basis_by_products(found, gradient, *given)
    # The same span: cosines of the angles between are 1 up to f32 products, whose
    # errors are of their condition, 24, and of a scale that only one of them has.
    cosines = np.linalg.svd(np.asarray(direct.T @ by_products))[1]
    np.testing.assert_allclose(cosines, 1, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the rank reaches a dimension")
@settings(max_examples=40, deadline=None)
@given(
    exponent=st.floats(-4, 0),
    scale=st.sampled_from([1e-30, 1e-8, 1.0, 1e8, 1e30]),
    rank=st.sampled_from([1, 7, 20]),
    seed=st.integers(0, 1000),
)
def test_power_on_generated_spectra(
    exponent: float, scale: float, rank: int, seed: int
) -> None:
    unit = with_spectrum(seed, (20, 30), np.arange(1, 21) ** exponent)
    state = refreshed(subspace.power(), (unit * scale).astype(np.float32), rank=rank)
    assert orthonormality(state.projector["w"]) < ORTHONORMAL
    assert state.refresh.refused["w"] == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-10, 1e10, 1e30])
@pytest.mark.parametrize("method", ["svd", "eigh", "randomized", "power"])
def test_basis_does_not_depend_on_the_scale(method: str, scale: float) -> None:
    gradient = with_spectrum(1, (32, 64), np.linspace(2, 1, 32) ** 3).astype(np.float32)
    one = np.asarray(refreshed(METHODS[method], gradient).projector["w"], np.float64)
    other = refreshed(
        METHODS[method], (gradient * np.float32(scale)).astype(np.float32)
    )
    two = np.asarray(other.projector["w"], np.float64)
    # Scaling rounds each entry by half an ulp; the gap of the spectrum turns that into
    # an angle of eps sigma_1 / (sigma_8 - sigma_9), near 1e-5.
    np.testing.assert_allclose(one @ one.T, two @ two.T, atol=1e-4)


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_a_bad_gradient_is_refused_and_tried_again(method: str, bad: float) -> None:
    tx = go.galore(optax.sgd(0.1), rank=4, update_proj_gap=4, subspace=METHODS[method])
    params = {"a": jnp.zeros((8, 12)), "stack": jnp.zeros((8, 12))}
    state, update = tx.init(params), jax.jit(tx.update)
    good = normal_like(params, 0)
    _, state = update(good, state)
    for _ in range(3):
        _, state = update(good, state)
    kept = np.asarray(state.projector["a"])
    spoiled = jnp.full((8, 12), bad) if bad == 0 else good["a"].at[3, 4].set(bad)
    for tries in (1, 2):
        _, state = update({**good, "a": spoiled}, state)
        np.testing.assert_array_equal(state.projector["a"], kept)
        assert counters(state.refresh.refused) == [tries, 0]
        assert counters(state.refresh.last) == [0, 4]
    _, state = update(normal_like(params, 1), state)
    assert counters(state.refresh.last) == [6, 4]
    assert orthonormality(state.projector["a"]) < ORTHONORMAL


def test_a_basis_that_fails_the_check_is_refused() -> None:
    class Broken:
        orthonormal = True

        def basis(self, gradient: Any, previous: Any, key: Any, cold: Any) -> Any:
            return 1.1 * previous

    state = refreshed(Broken(), np.eye(8, 12, dtype=np.float32), rank=4)
    np.testing.assert_array_equal(state.projector["w"], np.eye(8, 4))
    assert counters(state.refresh.refused) == [1]


def test_one_bad_matrix_of_a_stack_does_not_hold_up_the_others() -> None:
    tx = go.galore(optax.sgd(0.1), rank=2)
    grads = normal_like(MODEL, 0)
    kernel = grads["layers"]["up"]["kernel"].at[1].set(jnp.nan)
    grads["layers"]["up"]["kernel"] = kernel
    _, state = tx.update(grads, tx.init(MODEL))
    assert counters(state.refresh.last) == [0, -1, 0, 0]


@pytest.mark.parametrize("method", ["svd", "eigh", "randomized", "power"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
def test_captured_energy(method: str, proj_type: str) -> None:
    values = np.arange(1, 33) ** -0.7
    gradient = with_spectrum(2, (32, 64), values).astype(np.float32)
    tx = go.galore(
        optax.sgd(0.1), rank=8, subspace=METHODS[method], proj_type=proj_type
    )
    grads = {"w": jnp.asarray(gradient)}
    _, state = tx.update(grads, tx.init(grads))
    best = np.sum(values[:8] ** 2) / np.sum(values**2)
    found = float(go.captured_energy(tx, state, grads)["w"])
    assert 0.98 * best < found < best * (1 + 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_what_rounded_products_lose(dtype: Any) -> None:
    values = np.linspace(2, 1, 32) ** 3
    gradient = with_spectrum(3, (32, 64), values).astype(np.float32)
    power = subspace.power(cold_steps=100, product_dtype=dtype)
    tx = go.galore(optax.sgd(0.1), rank=8, subspace=power)
    grads = {"w": jnp.asarray(gradient)}
    _, state = tx.update(grads, tx.init(grads))
    kept, left_out = values[:8, None], values[None, 8:]
    best = np.sum(kept**2) / np.sum(values**2)
    found = float(go.captured_energy(tx, state, grads)["w"])
    # Three roundings are noise on every entry, which turns direction i towards j by
    # noise / (sigma_i - sigma_j); what that takes off the energy is of second order.
    unit = float(jnp.finfo(dtype).eps) / 2
    noise = 3 * unit**2 / 3 * np.mean(gradient**2)
    loss = noise * np.sum((kept + left_out) / (kept - left_out)) / np.sum(kept**2)
    f32 = 1e-6  # the energies are sums of 2,000 squares
    assert best * (1 - loss - f32) < found < best * (1 + f32)


def test_gradients_in_f64_are_not_rounded() -> None:
    with jax.enable_x64(True):
        gradient = jnp.asarray(with_spectrum(4, (32, 64), 0.5 ** np.arange(32)))
        tx = go.galore(optax.sgd(0.1), rank=8, projector_dtype=jnp.float64)
        grads = {"w": gradient}
        _, state = tx.update(grads, tx.init(grads))
        found = np.asarray(state.projector["w"])
    left, *_ = np.linalg.svd(np.asarray(gradient), full_matrices=False)
    # A power step shrinks what is not of the leading eight by 4 and more; five do by
    # a thousand. bf16 alone would leave 2e-3 of the first direction outside.
    outside = left[:, 0] - found @ (found.T @ left[:, 0])
    assert np.linalg.norm(outside) < 1e-9


def test_power_finds_what_the_old_basis_cannot_see() -> None:
    # The old basis is orthogonal to all of the new gradient.
    tx = go.galore(optax.sgd(0.1), rank=4, update_proj_gap=1)
    first = {"w": jnp.zeros((32, 48)).at[:8].set(normal(0, (8, 48)))}
    second = {"w": jnp.zeros((32, 48)).at[8:].set(normal(1, (24, 48)))}
    _, state = tx.update(first, tx.init(first))
    _, state = tx.update(second, state)
    values = np.linalg.svd(second["w"], compute_uv=False) ** 2
    best = values[:4].sum() / values.sum()
    assert float(go.captured_energy(tx, state, second)["w"]) > 0.7 * best


def test_gaussian_random_projector_is_not_orthonormal_and_is_kept() -> None:
    state = refreshed(
        subspace.random(orthonormal=False), np.eye(32, 64, dtype=np.float32)
    )
    assert orthonormality(state.projector["w"]) > 0.1
    assert counters(state.refresh.refused) == [0]


def test_matrices_and_steps_draw_different_random_bases() -> None:
    tx = go.galore(
        optax.sgd(0.1), rank=2, update_proj_gap=1, subspace=subspace.random()
    )
    params = {"stack": jnp.ones((8, 8)), "other": jnp.ones((8, 8))}
    _, one = tx.update(params, tx.init(params))
    _, two = tx.update(params, one)
    bases = [np.asarray(s.projector[k]) for s in (one, two) for k in params]
    for i in range(4):
        for j in range(i):
            assert not np.allclose(bases[i], bases[j])
