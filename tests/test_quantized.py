# SPDX-License-Identifier: Apache-2.0
"""Eight-bit moments: the codes against their definitions, the wrapper against Adam."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import galore_optax as go
from galore_optax import codes
from galore_optax.codes import Quantized
from galore_optax.codes.dynamic import table
from tests.helpers import normal

CODES = {"dynamic": codes.dynamic(), "companded": codes.companded()}
each = pytest.mark.parametrize("code", CODES.values(), ids=CODES)
arrays = st.tuples(
    st.integers(0, 2**31), st.integers(-30, 6), st.integers(1, 5), st.booleans()
)


def sample(seed: int, exponent: int, rows: int, signed: bool) -> np.ndarray:
    """Entries over many decades, some zero."""
    rng = np.random.default_rng(seed)
    shape = (rows, 1024)
    x = rng.standard_normal(shape) * 10.0 ** rng.uniform(exponent, exponent + 4, shape)
    x = np.where(rng.random(shape) < 0.1, 0, x).astype(np.float32)
    return x if signed else np.abs(x)


# The code of bitsandbytes, written from its definition and not from ours.


def reference_table(signed: bool) -> np.ndarray:
    values = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(0.1, 1.0, 2 ** (i + (not signed)) + 1)
        for low, high in itertools.pairwise(edges):
            value = 10 ** (-6 + i) * (low + high) / 2
            values += [value, -value] if signed else [value]
    return np.sort(np.array(values, np.float32))


def reference_encode(x: np.ndarray, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    flat = x.reshape(-1)
    values = reference_table(signed)
    found = np.zeros(flat.shape, np.uint8)
    scales = []
    for start in range(0, flat.size, 256):
        block = flat[start : start + 256]
        scale = np.float32(np.abs(block).max())
        unit = block / scale if scale else block
        distances = np.abs(unit[:, None].astype(np.float64) - values)
        found[start : start + 256] = distances.argmin(1)
        scales.append(scale)
    return found.reshape(x.shape), np.array(scales, np.float32)


def reference_decode(found: np.ndarray, scales: np.ndarray, signed: bool) -> np.ndarray:
    values = reference_table(signed)[found.reshape(-1)]
    return (values * np.repeat(scales, 256)[: values.size]).reshape(found.shape)


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_is_bitsandbytes(signed: bool) -> None:
    values = table(signed)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, reference_table(signed))
    assert len(np.unique(values)) == 256
    if signed:  # as published: no -1, and these extremes
        assert values.min() == pytest.approx(-0.99297, abs=1e-5)
        assert values[values > 0].min() == pytest.approx(5.5e-7)
    else:
        assert values[values > 0].min() == pytest.approx(3.25e-7)


@settings(max_examples=30, deadline=None)
@given(arrays)
def test_dynamic_takes_the_nearest_entry(what: Any) -> None:
    signed = what[3]
    x = sample(*what)
    coded = jax.jit(lambda x: codes.dynamic().encode(x, signed))(x)
    expected, scales = reference_encode(x, signed)
    np.testing.assert_array_equal(coded.scales, scales)
    values = reference_table(signed)
    unit = np.abs(x / np.repeat(scales, 256).reshape(x.shape).clip(1e-45))
    ours, theirs = (np.abs(values[c] * np.sign(1)) for c in (coded.codes, expected))
    # Entries halfway between two values may go either way, by a rounding of 2^-24.
    off = np.asarray(coded.codes) != expected
    gap = np.abs(np.abs(unit - ours) - np.abs(unit - theirs))
    assert np.all(gap[off] <= 4 * 2**-24)
    assert off.mean() < 1e-3


@settings(max_examples=20, deadline=None)
@given(arrays)
def test_dynamic_decodes_to_the_entry(what: Any) -> None:
    signed = what[3]
    coded = codes.dynamic().encode(jnp.asarray(sample(*what)), signed)
    expected = reference_decode(*map(np.asarray, coded), signed)
    found = jax.jit(lambda c: codes.dynamic().decode(c, signed))(coded)
    np.testing.assert_array_equal(found, expected)


def test_dynamic_takes_arrays_of_any_length() -> None:
    x = sample(0, -3, 5, True)[:, :1001]
    coded = codes.dynamic().encode(jnp.asarray(x), True)
    expected, scales = reference_encode(x, True)
    np.testing.assert_array_equal(coded.codes, expected)
    np.testing.assert_array_equal(coded.scales, scales)


@settings(max_examples=10, deadline=None)
@given(arrays, st.sampled_from([None, 8, 32]))
def test_companded_error(what: Any, block: int | None) -> None:
    signed = what[3]
    code = codes.companded(block=block)
    x = sample(*what)
    coded = code.encode(jnp.asarray(x), signed)
    back = np.asarray(code.decode(coded, signed))
    width = block or 64  # of 1,024 entries
    largest = np.abs(x.reshape(x.shape[0], -1, width)).max(2)
    scales = np.asarray(coded.scales, np.float32)
    # Rounded up to bf16, which is at most one part in 2^7 above.
    assert np.all(scales >= largest)
    assert np.all(scales <= largest * (1 + 2**-7))
    unit = np.repeat(scales, width, axis=1).clip(1e-45)
    # z = |u|^(1/power) is off by half a step at most, and |u| = z^power. The root's own
    # rounding, 127 · 2^-24, shifts where a code ends by less than a hundredth of that.
    power, levels = (2, 127) if signed else (4, 255)
    z = np.abs(x / unit) ** (1 / power)
    step = np.where((z * levels < 0.5) & (not signed), 1.01, 0.505) / levels
    normal_scale = unit > 1e-30  # below, f32 itself is coarse
    error, bound = np.abs(back - x), ((z + step) ** power - z**power) * unit
    assert np.all(error[normal_scale] <= bound[normal_scale])
    if not signed:
        assert np.all(back[(x > 0) & normal_scale] > 0)
    np.testing.assert_array_equal(back[x == 0], 0)
    assert np.all(np.sign(back) * np.sign(x) >= 0)


@pytest.mark.parametrize("share", [1, 10, 1000])
def test_no_moment_is_divided_by_one_that_became_zero(share: int) -> None:
    """Entries r of their block's largest √v, in blocks whose own m is 1 / share of √v.

    Rounded up m grows fourfold at most, from half a level. √v falls by (2 / 3)² at
    most, from just below one and a half, and never to zero.
    """
    r = np.logspace(-10, 0, 1024, dtype=np.float32).reshape(32, 32)
    r[:, 0] = 1  # one in each block
    r = np.tile(r.reshape(-1), (8, 1))
    m, v = np.minimum(r, np.float32(1 / share)), r**2
    code = codes.companded()
    m = code.decode(code.encode(jnp.asarray(m), True), True)
    v = code.decode(code.encode(jnp.asarray(v), False), False)
    assert float((m / (jnp.sqrt(v) + 1e-8)).max()) <= 4 * (3 / 2) ** 2


@each
@pytest.mark.parametrize("signed", [True, False])
def test_what_is_not_finite_counts_as_zero(code: Any, signed: bool) -> None:
    x = np.abs(np.asarray(normal(0, (4, 1024))))
    bad = x.copy()
    bad[1, 5], bad[2, 6], bad[3, 7] = np.nan, np.inf, -np.inf
    zeroed = np.where(np.isfinite(bad), bad, 0)
    for one, two in zip(
        code.encode(jnp.asarray(bad), signed),
        code.encode(jnp.asarray(zeroed), signed),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)


def test_fifty_steps_of_bitsandbytes_adam() -> None:
    """Its kernel: moments from codes, the step from unrounded moments, then codes."""
    shape, lr, b1, b2, eps = (24, 256), 1e-2, 0.9, 0.999, 1e-8
    p = np.asarray(normal(0, shape)).copy()
    m, v = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    m_coded, v_coded = reference_encode(m, True), reference_encode(v, False)
    tx = go.quantized(optax.adam(lr, b1, b2, eps), code=codes.dynamic())
    params = jnp.asarray(p)
    state, update = tx.init(params), jax.jit(tx.update)
    for t in range(1, 51):
        g = np.asarray(normal(t, shape)) * np.float32(10.0 ** (t % 5 - 4))
        updates, state = update(jnp.asarray(g), state)
        params = optax.apply_updates(params, updates)
        m = np.float32(b1) * reference_decode(*m_coded, True) + np.float32(1 - b1) * g
        v = np.float32(b2) * reference_decode(*v_coded, False)
        v += np.float32(1 - b2) * g * g
        c1, c2 = np.float32(1 - b1**t), np.float32(np.sqrt(1 - b2**t))
        p -= np.float32(lr) * c2 / c1 * (m / (np.sqrt(v) + c2 * np.float32(eps)))
        m_coded, v_coded = reference_encode(m, True), reference_encode(v, False)
    for ours, theirs in ((state[0].mu, m_coded), (state[0].nu, v_coded)):
        np.testing.assert_allclose(ours.scales, theirs[1], rtol=1e-5)
        differ = np.asarray(ours.codes, int) - theirs[0]
        assert np.abs(differ).max() <= 1  # where rounding decides a tie
        assert (differ != 0).mean() < 1e-3
    # A code that differs by one moves a moment by at most 4 %, once, of a step of lr.
    error = np.abs(np.asarray(params) - p)
    assert np.quantile(error, 0.99) < 50 * lr * 1e-5
    assert error.max() < 0.05 * lr * 10


def test_small_arrays_stay_as_they_are() -> None:
    params = {"large": jnp.ones((64, 64)), "small": jnp.ones((63, 64))}
    tx = go.quantized(optax.adam(1e-3), code=codes.dynamic())
    mu = tx.init(params)[0].mu
    assert mu["large"].codes.dtype == jnp.uint8
    assert mu["small"].codes.dtype == jnp.float32
    exact = optax.adam(1e-3)
    found, _ = tx.update(params, tx.init(params))
    expected, _ = exact.update(params, exact.init(params))
    np.testing.assert_array_equal(found["small"], expected["small"])


@each
@pytest.mark.parametrize("where", ["inside", "around"])
def test_with_galore(code: Any, where: str) -> None:
    adamw, options = optax.adamw(1e-2, weight_decay=0.1), {"rank": 32}
    params = {"kernel": normal(0, (64, 256)), "bias": jnp.zeros(256)}
    tx = {
        "inside": lambda: go.galore(go.quantized(adamw, code=code), **options),
        "around": lambda: go.quantized(go.galore(adamw, **options), code=code),
    }[where]()
    exact = go.galore(adamw, **options)
    state, expected_state = tx.init(params), exact.init(params)
    update, exact_update = jax.jit(tx.update), jax.jit(exact.update)
    for step in range(4):
        g = {"kernel": normal(step, (64, 256)), "bias": normal(9, (256,))}
        found, state = update(g, state, params)
        expected, expected_state = exact_update(g, expected_state, params)
        distance = jnp.linalg.norm(found["kernel"] - expected["kernel"])
        # Both codes keep moments to a few per cent of each entry that matters.
        assert distance < 0.1 * jnp.linalg.norm(expected["kernel"])
        np.testing.assert_allclose(found["bias"], expected["bias"], rtol=1e-5)
    moments = state.inner_state[0]
    assert moments.mu["kernel"].codes.shape == (32, 256)
    assert moments.nu["kernel"].codes.dtype == jnp.uint8
    assert state.projector["kernel"].dtype == jnp.float32


def test_ready_made_equals_its_parts() -> None:
    params = {"kernel": normal(0, (64, 256))}
    one = go.galore_adamw8bit(1e-2, rank=32, weight_decay=0.1)
    two = go.galore(go.quantized(optax.adamw(1e-2, weight_decay=0.1)), rank=32)
    states = [tx.init(params) for tx in (one, two)]
    updates = [jax.jit(tx.update) for tx in (one, two)]
    for step in range(3):
        found = [
            update({"kernel": normal(step, (64, 256))}, state, params)
            for update, state in zip(updates, states, strict=True)
        ]
        states = [state for _, state in found]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_bytes() -> None:
    params = {"kernel": jnp.zeros((256, 1024))}
    adam = optax.adam(1e-3)

    def moments(tx: Any) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(tx.init(params))) - 4  # count

    exact, entries = moments(adam), 2 * 256 * 1024
    assert exact == 4 * entries
    dynamic = go.quantized(adam, code=codes.dynamic())
    assert moments(dynamic) == entries + 4 * entries // 256
    assert moments(go.quantized(adam)) == entries + 2 * entries // 64


def test_a_block_that_does_not_divide_names_the_leaf() -> None:
    tx = go.quantized(optax.adam(1e-3), code=codes.companded(block=48))
    with pytest.raises(ValueError, match=r"'0/mu/w': block=48 does not divide axis 1"):
        tx.init({"w": jnp.ones((64, 100))})


# Lengths, and equal parts of each whose last block is the shorter: vocabularies, a
# prime, and both sides of where a block has its 64 entries.


@each
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(64, 128), (3, 101), (2, 67, 5), (7,)])
def test_zeros_are_what_encode_makes_of_zeros(
    code: Any, signed: bool, shape: tuple[int, ...]
) -> None:
    found, expected = code.zeros(shape, signed), code.encode(jnp.zeros(shape), signed)
    for one, two in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.dtype == two.dtype


def test_a_state_of_another_code_is_refused() -> None:
    params = {"w": jnp.ones((64, 128))}
    makers = [codes.dynamic(), codes.companded(), codes.companded(block=16)]
    for mine in makers:
        tx = go.quantized(optax.adam(1e-3), code=mine)
        tx.update(params, tx.init(params))
        for other in makers:
            if other != mine:
                state = go.quantized(optax.adam(1e-3), code=other).init(params)
                with pytest.raises(ValueError, match="'0/mu/w' was stored under anoth"):
                    tx.update(params, state)


def test_other_refusals() -> None:
    with pytest.raises(TypeError, match="code='dynamic' is no code"):
        go.quantized(optax.adam(1e-3), code="dynamic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing to store in eight bits"):
        go.quantized(optax.sgd(1e-3)).init({"w": jnp.ones((64, 128))})
    for make in (codes.dynamic, codes.companded):
        with pytest.raises(ValueError, match=r"block=0\): must be at least 1"):
            make(block=0)


def test_own_names_of_moments() -> None:
    params = {"w": jnp.ones((64, 128))}
    names = {"n": "unsigned", "m": "signed", "v": "signed"}
    tx = go.quantized(optax.adan(1e-3), moments=names)  # type: ignore[arg-type]
    state = tx.init(params)
    stored = [
        x
        for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Quantized))
        if isinstance(x, Quantized)
    ]
    assert len(stored) == 3
    tx.update(params, state, params)
