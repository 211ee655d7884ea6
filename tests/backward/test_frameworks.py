# SPDX-License-Identifier: Apache-2.0
"""Models of Flax and Equinox, as they are."""

from typing import Any

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.backward.helpers import assert_equal_ways, normals, uses

BATCH, TOKENS, WIDTH, HEADS = 2, 5, 8, 2
X = normals(2, x=(BATCH, TOKENS, WIDTH))["x"]
# As in test_calls, through a softmax and a few more products.
F32 = 3e-5


def total(y: Any) -> Any:
    return jnp.sum(jnp.sin(y + 0.3))


def of_linen() -> tuple[Any, Any]:
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            x = x + linen.MultiHeadDotProductAttention(HEADS, deterministic=True)(x)
            return x + linen.Dense(WIDTH)(jnp.tanh(linen.Dense(2 * WIDTH)(x)))

    model = Model()
    return lambda p, x: total(model.apply(p, x)), model.init(jax.random.key(0), X)


def of_nnx() -> tuple[Any, Any]:
    class Model(nnx.Module):
        def __init__(self) -> None:
            rngs = nnx.Rngs(0)
            self.mix = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
            self.up = nnx.LinearGeneral(WIDTH, (2, WIDTH), rngs=rngs)
            self.down = nnx.LinearGeneral((2, WIDTH), WIDTH, axis=(-2, -1), rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = x + self.mix(x)
            return x + self.down(jnp.tanh(self.up(x)))

    graphdef, params = nnx.split(Model())
    return lambda p, x: total(nnx.merge(graphdef, p)(x)), params


def of_equinox() -> tuple[Any, Any]:
    keys = jax.random.split(jax.random.key(0))
    model = (
        eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[0]),
        eqx.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, 1, key=keys[1]),
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params: Any, x: Any) -> Any:
        mix, mlp = eqx.combine(params, static)
        x = x + jax.vmap(lambda x: mix(x, x, x))(x)
        return total(x + jax.vmap(jax.vmap(mlp))(x))

    return loss, params


def of_grouped_queries() -> tuple[Any, Any]:
    """Four heads of queries to two of keys and values."""
    shapes = {"k": (WIDTH, 2, 4), "q": (WIDTH, 4, 4), "v": (WIDTH, 2, 4)}
    params = normals(3, **shapes, out=(4, 4, WIDTH))
    params = {name: {"kernel": value} for name, value in params.items()}

    def loss(params: Any, x: Any) -> Any:
        q, k, v = (
            jnp.einsum("btd,dhk->bthk", x, params[name]["kernel"]) for name in "qkv"
        )
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return total(jnp.einsum("bthk,hkd->btd", mixed, params["out"]["kernel"]))

    return loss, params


@pytest.mark.parametrize(
    "make", [of_linen, of_nnx, of_equinox, of_grouped_queries], ids=lambda f: f.__name__
)
def test_no_gradient_of_a_model_is_formed(make: Any) -> None:
    loss, params = make()
    assert_equal_ways(loss, params, X, tolerance=F32)
    found = uses(loss, params, X)
    assert len(found) >= 4
    assert not any(found.values())
