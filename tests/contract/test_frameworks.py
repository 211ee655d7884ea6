# SPDX-License-Identifier: Apache-2.0
"""In Flax's optimizers: NNX, and linen with partition specs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

from tests.contract.subjects import LR, assert_close, every
from tests.helpers import normal_like

nnx = pytest.importorskip("flax.nnx")
nn = pytest.importorskip("flax.linen")
STEPS = 3


class Model(nnx.Module):
    """An embedding, a norm, a bias, an annotated kernel and a head."""

    def __init__(self, rngs: Any):
        init = nnx.with_metadata(nnx.initializers.normal(), axes=("in", "out"))
        self.embed = nnx.Embed(20, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(16, rngs=rngs)
        self.up = nnx.Linear(16, 32, kernel_init=init, rngs=rngs)
        self.down = nnx.Linear(32, 16, use_bias=False, rngs=rngs)


def pure(tree: Any) -> Any:
    return nnx.to_pure_dict(nnx.state(tree, nnx.Param))


@every
@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_nnx_optimizer_equals_plain_use(make: Any, jitted: bool) -> None:
    model = Model(nnx.Rngs(0))
    weights, tx = pure(model), make()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(model: Any, optimizer: Any, gradients: Any) -> None:
        optimizer.update(model, gradients)

    step, update = (nnx.jit(step), jax.jit(tx.update)) if jitted else (step, tx.update)
    state = tx.init(weights)
    for number in range(STEPS):
        gradients = normal_like(weights, number)
        boxed = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(boxed, gradients)
        step(model, optimizer, boxed)
        updates, state = update(gradients, state, weights)
        weights = optax.apply_updates(weights, updates)
    assert "axes" in model.up.kernel.get_metadata()
    # The same operations in the same order; fused differently, perhaps, with an ulp.
    assert_close(pure(model), weights, rtol=1e-5, atol=1e-6)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        def over(*names: str | None) -> Any:
            return nn.with_partitioning(nn.initializers.normal(1.0), names)

        x = nn.Embed(20, 16, embedding_init=over(None, "model"))(tokens)
        x = nn.LayerNorm()(x)
        x = nn.Dense(32, kernel_init=over(None, "model"), name="up")(x)
        return nn.Dense(16, kernel_init=over("model", None), name="down")(x)


@every
@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_linen_boxes_with_partition_specs(make: Any) -> None:
    tx, model = make(), Linen()

    def create() -> Any:
        boxed = model.init(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
        return boxed, tx.init(boxed)

    def step(weights: Any, state: Any, gradients: Any) -> Any:
        updates, state = tx.update(gradients, state, weights)
        return optax.apply_updates(weights, updates), state

    mesh = jax.make_mesh((2,), ("model",), (AxisType.Auto,), devices=jax.devices()[:2])
    specs = nn.get_partition_spec(jax.eval_shape(create))
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    weights, state = jax.jit(create, out_shardings=places)()
    run = jax.jit(step, in_shardings=(*places, places[0]), out_shardings=places)

    alone = nn.meta.unbox(weights)
    alone = jax.device_put(jax.tree.map(np.asarray, alone), jax.devices()[0])
    alone_state, alone_run = tx.init(alone), jax.jit(step)
    for number in range(STEPS):
        gradients = normal_like(alone, number)
        boxed = jax.tree.map(
            lambda box, x: (
                box.replace_boxed(x) if isinstance(box, nn.Partitioned) else x
            ),
            weights,
            gradients,
            is_leaf=lambda x: isinstance(x, nn.Partitioned),
        )
        weights, state = run(weights, state, jax.device_put(boxed, places[0]))
        alone, alone_state = alone_run(alone, alone_state, gradients)
    assert isinstance(weights["up"]["kernel"], nn.Partitioned)
    for x, place in zip(
        jax.tree.leaves(weights), jax.tree.leaves(places[0]), strict=True
    ):
        assert x.sharding.is_equivalent_to(place, x.ndim)
    # Sums over two devices differ by ulps; one code of eight bits may follow them.
    assert_close(nn.meta.unbox(weights), alone, atol=LR / 127)
