# SPDX-License-Identifier: Apache-2.0
"""Programs that Hypothesis makes of the supported operations."""

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from optax.contrib import MuonDimensionNumbers

from tests.backward.helpers import F64, assert_close, both, galore, state_of, x64

SHAPE = (2, 4, 6)  # two matrices
AXES = MuonDimensionNumbers(1, 2)

Way = tuple[str, int]  # an operation and what it takes from here


def followed(w: Any, way: Way) -> Any:
    """`w` after an operation that is linear in it."""
    name, number = way
    axis = number % max(w.ndim, 1)
    if w.ndim == 0:
        return w
    size = w.shape[axis]
    return {
        "cast": lambda: w.astype(jnp.float64),
        "scale": lambda: w * (1 + number),
        "turn": lambda: jnp.moveaxis(w, 0, axis),
        "reverse": lambda: w.T,
        "insert": lambda: jnp.expand_dims(w, axis),
        "repeat": lambda: jnp.broadcast_to(w, (2, *w.shape)),
        "cut": lambda: lax.slice_in_dim(w, size // 2, size, axis=axis),
        "index": lambda: jnp.take(w, jnp.array([size - 1, 0]), axis=axis),
        "dynamic": lambda: lax.dynamic_index_in_dim(
            w, jnp.int32(size // 2), axis, keepdims=number % 2 == 0
        ),
        "halve": lambda: (
            w.reshape(*w.shape[:axis], -1, 2, *w.shape[axis + 1 :])
            if size % 2 == 0
            else w
        ),
        "merge": lambda: w.reshape(-1, *w.shape[2:]),
        "pieces": lambda: jnp.split(w, size, axis=axis)[-1],
        "barrier": lambda: lax.optimization_barrier(w),
        "jit": lambda: jax.jit(lambda w: 2 * w)(w),
    }[name]()


def used(w: Any, contracted: int, placed: int, seed: int) -> Any:
    """The product of `w` with an array, over axes that are bits of `contracted`."""
    letters = "abcdefghijkl"[: w.ndim]
    summed = [x for i, x in enumerate(letters) if contracted >> i & 1]
    shared = [x for x in letters if x not in summed and ord(x) % 3 == placed]
    of_x = "t" + "".join((*summed, *shared))
    sizes = dict(zip(letters, w.shape, strict=True), t=3)
    shape = [sizes[x] for x in of_x]
    x = np.random.default_rng(seed).normal(size=shape) / math.sqrt(math.prod(shape))
    result = "".join(x for x in letters if x not in summed) + "t"
    return jnp.einsum(f"{letters},{of_x}->{result}", w, x)


def wrapped(wrap: str, use: Any) -> Any:
    """`use`, a function of the weight, inside another transformation."""

    def once(total: Any, w: Any) -> Any:
        return total + use(w), None

    return {
        "plain": use,
        "jit": jax.jit(use),
        "checkpoint": jax.checkpoint(use),
        "scan": lambda w: lax.scan(once, jnp.float64(0), w)[0],
        "constant": lambda w: lax.fori_loop(0, 2, lambda _, x: x + use(w), 0.0),
        "vmap": lambda w: jnp.sum(jax.vmap(use)(w)),
        "cond": lambda w: lax.cond(jnp.sum(w) > 0, use, lambda w: 2 * use(w), w),
    }[wrap]


OPERATIONS = (
    *("cast", "scale", "turn", "reverse", "insert", "repeat", "cut", "index"),
    *("dynamic", "halve", "merge", "pieces", "barrier", "jit"),
)
WRAPS = ("plain", "jit", "checkpoint", "scan", "constant", "vmap", "cond")
ways = st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 5)), max_size=4)


@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
@hypothesis.given(
    before=ways,
    inside=ways,
    wrap=st.sampled_from(WRAPS),
    contracted=st.integers(0, 31),
    placed=st.integers(0, 2),
    proj_type=st.sampled_from(["left", "right", "full"]),
)
def test_any_program_of_supported_operations(
    before: list[Way],
    inside: list[Way],
    wrap: str,
    contracted: int,
    placed: int,
    proj_type: Any,
) -> None:
    def use(w: Any) -> Any:
        for way in inside:
            w = followed(w, way)
        return jnp.sum(jnp.sin(used(w, contracted, placed, 1) + 0.3))

    def loss(w: Any) -> Any:
        for way in before:
            w = followed(w, way)
        return wrapped(wrap, use)(w)

    with x64():
        w = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE))
        tx = galore(weight_dimension_numbers=AXES, proj_type=proj_type)
        assert_close(*jax.jit(both(loss, tx, False))(w, state_of(tx, w)), F64)
