# SPDX-License-Identifier: Apache-2.0
"""The code of projectors in eight and four bits, by its definition."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from galore_optax.codes.affine import Affine
from tests.affine import blocks_of, decoded, scales_of

BITS = {"int8": 8, "int4": 4}
each = pytest.mark.parametrize("dtype", BITS)


@st.composite
def bases(draw: Any) -> np.ndarray:
    """Columns of any size; zero, of one sign, or mixed; entries over many decades."""
    # Each length is compiled once.
    length, rank = draw(st.sampled_from([1, 2, 7, 64, 65, 130, 257])), 4
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    x = rng.standard_normal((length, rank)) * 10 ** rng.uniform(-4, 0, (length, rank))
    signs = rng.choice(["zero", "positive", "negative", "far", "mixed"], rank)
    for column, sign in enumerate(signs):
        one = x[:, column]
        x[:, column] = {
            "zero": 0 * one,
            "positive": np.abs(one),
            "negative": -np.abs(one),
            "far": 1 + np.abs(one) / 100,
            "mixed": np.where(rng.random(length) < 0.2, 0, one),
        }[sign]
    return x.astype(np.float32)


@functools.cache
def round_trip(bits: int) -> Any:
    def run(x: jax.Array) -> Any:
        stored = Affine(bits).encode(x)
        return stored, Affine(bits).decode(stored, x.shape, jnp.float32)

    return jax.jit(run)


@pytest.mark.parametrize("bits", BITS.values())
@settings(max_examples=40, deadline=None)
@given(x=bases())
def test_round_trip(bits: int, x: np.ndarray) -> None:
    stored, back = round_trip(bits)(jnp.asarray(x))
    back = np.asarray(back)
    # Half a step, and a step is the exact one rounded up to bf16, one part in 2^7.
    exact = scales_of(x, bits)
    assert np.all(np.abs(back - x) <= exact / 2 * (1 + 2**-7) * (1 + 1e-6))
    np.testing.assert_array_equal(back[x == 0], 0)
    assert np.all(back * x >= 0)
    np.testing.assert_array_equal(back, decoded(stored, x.shape, bits).astype("f4"))
    scales = np.asarray(stored.scales, np.float64)
    _, size = blocks_of(len(x), bits == 4)
    assert np.all(scales >= exact[::size] * (1 - 1e-6))
    assert np.all(scales <= exact[::size] * (1 + 2**-7) * (1 + 1e-6))


@pytest.mark.parametrize("bits", BITS.values())
def test_what_a_range_without_zero_would_lose(bits: int) -> None:
    """Entries of one sign, far from zero: a zero point would have to be clipped."""
    x = jnp.linspace(0.5, 0.6, 64)[:, None]
    for basis in (x, -x):
        _, back = round_trip(bits)(basis)
        assert np.max(np.abs(back - basis)) <= 0.6 / (2**bits - 1) / 2 * 1.01


@pytest.mark.parametrize("length", [1, 64, 65, 257])
def test_packing_is_exact(length: int) -> None:
    """Every code of both halves of every byte, and lengths that fill no byte."""
    rng = np.random.default_rng(length)
    codes = rng.integers(0, 16, (length, 3))
    codes[rng.integers(length), :] = 15
    # Zeros at 0, a step of 1 where a block has a 15: such a basis is its own code.
    count, size = blocks_of(length, True)
    for start in range(0, length, size):
        codes[start] = 15
    stored, back = round_trip(4)(jnp.asarray(codes, jnp.float32))
    assert stored.codes.shape == (count * size // 2, 3)
    assert stored.codes.dtype == jnp.uint8
    np.testing.assert_array_equal(back, codes)
    np.testing.assert_array_equal(stored.scales, 1)
    np.testing.assert_array_equal(stored.zeros, 0)


def test_codes_by_hand() -> None:
    x = jnp.array([[-5.0], [0.0], [10.0], [3.4]])
    four, eight = (Affine(bits).encode(x) for bits in (4, 8))
    assert four.zeros.tolist() == [[5]]
    assert four.codes.tolist() == [[0 + 16 * 15], [5 + 16 * 8]]
    assert eight.scales.dtype == jnp.bfloat16
    step = float(eight.scales[0, 0])
    assert 15 / 255 <= step <= 15 / 255 * (1 + 2**-7)
    numbers = [round(value / step) for value in (-5, 0, 10, 3.4)]
    zero = round(5 / step)
    assert (eight.codes[:, 0].astype(int) + 128).tolist() == [n + zero for n in numbers]
