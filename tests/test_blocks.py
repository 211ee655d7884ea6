# SPDX-License-Identifier: Apache-2.0
"""How companded moments are cut into blocks that share a scale."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import galore_optax as go
from galore_optax import codes
from tests.helpers import normal

CODES = {"dynamic": codes.dynamic(), "companded": codes.companded()}
each = pytest.mark.parametrize("code", CODES.values(), ids=CODES)
arrays = st.tuples(
    st.integers(0, 2**31), st.integers(-30, 6), st.integers(1, 5), st.booleans()
)

UNEVEN = {32_003: 1, 50_304: 128, 4_099: 1, 134: 2, 131: 1, 67: 1}


def test_scales_have_the_axes_of_the_array() -> None:
    code = codes.companded(block=32)
    for shape, expected in {
        (4, 64, 256): (4, 64, 8),
        (4, 256, 64): (4, 8, 64),
        (128, 128): (128, 4),
    }.items():
        coded = code.encode(jnp.ones(shape), True)
        assert coded.scales.shape == expected
        assert coded.scales.dtype == jnp.bfloat16


@pytest.mark.parametrize("length", UNEVEN)
@pytest.mark.parametrize("axis", [0, 1])
def test_where_nothing_divides_the_last_block_is_shorter(
    length: int, axis: int
) -> None:
    """The codes are those of the array, its parts filled up with zeros."""
    parts = UNEVEN[length]
    size = length // parts
    count = -(-size // 64)
    width = -(-size // count)
    x = np.asarray(normal(0, (16, length)))
    filled = x.reshape(16, parts, size)
    filled = np.pad(filled, ((0, 0), (0, 0), (0, count * width - size)))
    code, whole = codes.companded(min_size=1), codes.companded(block=width, min_size=1)
    coded = whole.encode(jnp.asarray(filled.reshape(-1)), True)
    expected = whole.decode(coded, True).reshape(filled.shape)[..., :size]
    coded = code.encode(jnp.asarray(x if axis else x.T), True)
    found, turned = code.decode(coded, True), [x if axis else x.T for x in coded]
    expected = expected.reshape(x.shape)
    np.testing.assert_array_equal(found if axis else found.T, expected)
    assert turned[0].shape == x.shape
    assert turned[1].shape == (16, parts * count)
    state = go.quantized(optax.adam(1e-3), code=code).init({"w": jnp.asarray(x)})
    assert state[0].mu["w"].codes.dtype == jnp.int8


def test_blocks_fall_on_as_many_devices_as_their_axis_does() -> None:
    """Checkpoints hold their scales: entries of a block, by the length of an axis."""
    widths = {32_000: 50, 14_336: 56, 11_008: 43, 5_461: 43, 4_096: 64, 2_736: 57}
    widths |= {50_257: 29, 768: 48, 344: 43, 64: 64, 61: 61, 8: 8}
    code = codes.companded(min_size=1)
    for length, width in (widths | dict.fromkeys(UNEVEN)).items():
        scales = jax.eval_shape(lambda n=length: code.zeros((n,), True)).scales
        if width:
            assert scales.shape == (length // width,)
        assert scales.size <= max(1, length / 16)
        devices = 1
        while length % (2 * devices) == 0 and devices < min(128, length // 64):
            devices *= 2
            assert scales.size % devices == 0, (length, devices)


@pytest.mark.parametrize("length", [4_096, 11_008, 32_000])
@pytest.mark.parametrize("heavy", [False, True])
def test_smaller_blocks_lose_no_more(length: int, heavy: bool) -> None:
    """Than those of 64 entries, or of the nearest below that divides."""
    x = np.asarray(normal(0, (64, length)))
    x = jnp.asarray(x * np.exp(2 * np.asarray(normal(1, x.shape))) if heavy else x)

    def lost(block: int | None, signed: bool) -> np.ndarray:
        code, exact = codes.companded(block=block), x if signed else x * x
        found = code.decode(code.encode(exact, signed), signed)
        return np.square(np.float64(found) - np.float64(exact))

    for signed in (True, False):
        more = lost(None, signed) - lost(64, signed)
        # Blocks of 50 are no parts of those of 64: within two standard errors.
        assert more.sum() <= 2 * np.sqrt(np.square(more).sum())
