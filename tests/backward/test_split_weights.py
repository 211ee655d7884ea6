# SPDX-License-Identifier: Apache-2.0
"""Weights that are split over an Explicit mesh, gathered by the program where used."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_optax
from tests.backward.helpers import assert_close, galore, normals
from tests.meshes import eight

WIDTH, HIDDEN, LAYERS, TOKENS = 16, 24, 4, 8
# Of a stack (layers, width, hidden) and of a kernel (hidden, width).
SPLIT = {
    "layers": (P("fsdp"), P("fsdp")),
    "the projected axis": (P(None, "fsdp"), P(None, "fsdp")),
    "the kept axis": (P(None, None, "fsdp"), P("fsdp")),
}


def loss(params: Any, x: Any) -> Any:
    def layer(x: Any, w: Any) -> Any:
        w = gathered(w)
        return x + jnp.tanh(x @ w) @ w.T, None

    stack = params["layers"]["kernel"]
    if jax.typeof(stack).sharding.spec[:1] == ("fsdp",):  # a scan wants all layers
        stack = gathered(stack)
    x, _ = jax.lax.scan(layer, x, stack)
    return jnp.mean(jnp.sin(x @ gathered(params["kernel"]).T))


def gathered(w: Any) -> Any:
    mesh = jax.typeof(w).sharding.mesh
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.sharding.reshard(w, P(*[None] * w.ndim)) if explicit else w


@eight
@pytest.mark.parametrize(
    ("split", "storage"),
    [
        ("layers", None),
        ("the projected axis", jnp.int8),
        pytest.param("layers", jnp.int8, marks=pytest.mark.slow),
        pytest.param("the projected axis", None, marks=pytest.mark.slow),
        pytest.param("the kept axis", None, marks=pytest.mark.slow),
        pytest.param("the kept axis", jnp.int8, marks=pytest.mark.slow),
    ],
)
def test_weights_split_over_devices(split: str, storage: Any) -> None:
    """As on one device, steady and at a refresh by passes; f32 adds up the same terms,
    fewer than 1,000, in another order."""
    arrays = normals(1, stack=(LAYERS, WIDTH, HIDDEN), kernel=(HIDDEN, WIDTH))
    params = {"layers": {"kernel": arrays["stack"]}, "kernel": arrays["kernel"]}
    params = jax.tree.map(jnp.float32, params)
    x = jnp.float32(normals(2, x=(TOKENS, WIDTH))["x"])
    method = galore_optax.subspace.power(product_dtype=jnp.float32)
    tx = galore(subspace=method, projector_dtype=storage)

    def twice(params: Any, state: Any, x: Any) -> Any:
        run = galore_optax.value_and_projected_grad
        first, low, state = run(loss, tx, refresh=True)(params, state, x)
        return first, low, run(loss, tx, refresh=False)(params, state, x)[:2]

    expected = jax.jit(twice)(params, tx.init(params), x)
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        stack, kernel = (NamedSharding(mesh, spec) for spec in SPLIT[split])
        places = {"layers": {"kernel": stack}, "kernel": kernel}
        params = jax.device_put(params, places)
        x = jax.device_put(x, NamedSharding(mesh, P("fsdp")))
        found = jax.jit(twice)(params, jax.jit(tx.init)(params), x)
    assert_close(jax.device_get(found), expected, 1e-4)
