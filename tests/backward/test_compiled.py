# SPDX-License-Identifier: Apache-2.0
"""What is in the compiled program: no gradient, and little on the wire."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

import galore_optax
from tests.backward.helpers import RANK, assert_close, both, formed, galore, normals

# No two sizes are equal, so that a shape says whose it is.
LAYERS, TOKENS, WIDTH, HIDDEN = 3, 40, 12, 20
PARAMS = normals(
    1, down=(LAYERS, HIDDEN, WIDTH), scale=(WIDTH,), up=(LAYERS, WIDTH, HIDDEN)
)
AXES = {
    "down": MuonDimensionNumbers(1, 2),
    "scale": None,
    "up": MuonDimensionNumbers(1, 2),
}
X = normals(2, x=(TOKENS, WIDTH))["x"]
SIZES = {WIDTH, HIDDEN}


def loss(params: Any, x: Any) -> Any:
    @jax.checkpoint
    def layer(x: Any, weights: Any) -> Any:
        return x + jnp.tanh(x @ weights["up"]) @ weights["down"], None

    weights = {name: params[name] for name in ("up", "down")}
    return jnp.mean(jnp.sin(lax.scan(layer, x, weights)[0] * params["scale"]))


def hlo(function: Any, *args: Any) -> str:
    return jax.jit(function).lower(*args).compile().as_text()


def products(text: str) -> list[tuple[int, ...]]:
    """Shapes of all products in a program."""
    shapes = re.findall(r"= \w+\[([\d,]+)\]\S* (?:dot|custom-call)\(", text)
    return [tuple(map(int, shape.split(","))) for shape in shapes]


def of_gradients(text: str) -> list[tuple[int, ...]]:
    return [shape for shape in products(text) if set(shape) >= SIZES]


@pytest.mark.parametrize(
    ("proj_type", "refresh"),
    [("left", False), ("right", None), ("full", False), ("full", True)],
)
def test_no_product_makes_a_gradient(proj_type: Any, refresh: Any) -> None:
    tx = galore(weight_dimension_numbers=AXES, proj_type=proj_type)
    state = tx.init(PARAMS)
    never = galore_optax.value_and_projected_grad(loss, tx, refresh=refresh)
    assert of_gradients(hlo(formed(loss, tx, False), PARAMS, state, X))
    text = hlo(never, PARAMS, state, X)
    assert products(text)
    assert not of_gradients(text)


def test_no_zero_addend_takes_memory() -> None:
    """Nothing of the size of all coordinates goes forward, only what comes back."""
    tx = galore(weight_dimension_numbers=AXES)
    never = galore_optax.value_and_projected_grad(loss, tx, refresh=False)
    text = hlo(never, PARAMS, tx.init(PARAMS), X)
    loops = [line for line in text.splitlines() if " while(" in line]
    low = f"f32[{LAYERS},{RANK},"
    counts = sorted(line.partition(" while(")[0].count(low) for line in loops)
    assert counts[0] == 0  # forward
    assert len(counts) == 2


def all_reduced(text: str) -> list[int]:
    """Entries of what a program sums over devices."""
    found = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    shapes = re.findall(r"\w+\[([\d,]*)\]", " ".join(found))
    return [math.prod(map(int, filter(None, x.split(",")))) for x in shapes]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_coordinates_alone_cross_the_network(kind: Any) -> None:
    """Of a batch on eight devices: loss, coordinates and what is not projected."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    tx = galore()
    split = NamedSharding(mesh, PartitionSpec("data"))
    with jax.set_mesh(mesh):
        everywhere = NamedSharding(mesh, PartitionSpec())
        params = normals(1, v=(HIDDEN, WIDTH), w=(WIDTH, HIDDEN), z=(WIDTH,))
        params = jax.device_put(params, everywhere)
        x = jax.device_put(X, split)
        state = tx.init(params)

        def sharded(params: Any, x: Any) -> Any:
            spec = PartitionSpec("data") if kind == AxisType.Explicit else None
            y = jnp.dot(x, params["w"], out_sharding=spec)
            y = jnp.dot(jnp.tanh(y), params["v"], out_sharding=spec)
            return jnp.mean(jnp.sin(y * params["z"]))

        pair = jax.jit(both(sharded, tx, False))(params, state, x)
        assert_close(*pair, 1e-5)
        never = galore_optax.value_and_projected_grad(sharded, tx, refresh=False)
        sent = all_reduced(hlo(never, params, state, x))
        dense = all_reduced(hlo(formed(sharded, tx, False), params, state, x))
        renewing = galore_optax.value_and_projected_grad(sharded, tx, refresh=True)
        renewed = all_reduced(hlo(renewing, params, state, x))
    assert sum(sent) == 1 + WIDTH + 2 * RANK * HIDDEN
    assert sum(dense) == 1 + WIDTH + 2 * WIDTH * HIDDEN
    # Once more in the body of the loop: the coordinates on one side and on the other.
    assert sum(renewed) == sum(sent) + 2 * RANK * (HIDDEN + WIDTH)
