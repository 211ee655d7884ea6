# SPDX-License-Identifier: Apache-2.0
"""Eight-bit moments in trees of all kinds: boxes, integers, other states, `init`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import galore_optax as go
from galore_optax.codes import Quantized, companded
from tests.helpers import normal, normal_like

LR = 1e-2
SMALL = companded(min_size=32)  # codes biases too
EIGHT_BIT = {
    "galore_adamw8bit": lambda: go.galore_adamw8bit(LR, rank=4, code=SMALL),
    "galore(quantized(adam))": lambda: go.galore(
        go.quantized(optax.adam(LR)), rank=4, update_proj_gap=2
    ),
    "quantized(galore)": lambda: go.quantized(
        go.galore(optax.adamw(LR), rank=4), code=SMALL
    ),
    "quantized(adamw)": lambda: go.quantized(optax.adamw(LR), code=SMALL),
}
UNCODED = dict.fromkeys(EIGHT_BIT.values(), lambda: go.galore(optax.adamw(LR), rank=4))
UNCODED[EIGHT_BIT["galore(quantized(adam))"]] = lambda: go.galore(
    optax.adam(LR), rank=4
)
UNCODED[EIGHT_BIT["quantized(adamw)"]] = lambda: optax.adamw(LR)
every = pytest.mark.parametrize("make", EIGHT_BIT.values(), ids=EIGHT_BIT)


def is_coded(node: Any) -> bool:
    return isinstance(node, Quantized)


def coded(state: Any) -> list[Quantized]:
    return [x for x in jax.tree.leaves(state, is_leaf=is_coded) if is_coded(x)]


def assert_same(one: Any, two: Any, tolerance: float = 1e-6) -> None:
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * LR)


@every
@pytest.mark.parametrize("compiled", [True, False], ids=["nnx.jit", "eager"])
def test_in_an_nnx_optimizer(make: Any, compiled: bool) -> None:
    """Embedding, norm, kernel and bias, for three steps, as without NNX."""
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs: Any):
            self.embed = nnx.Embed(20, 16, rngs=rngs)
            self.norm = nnx.LayerNorm(16, rngs=rngs)
            self.up = nnx.Linear(16, 32, rngs=rngs)

    model, tx = Model(nnx.Rngs(0)), make()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state, update = tx.init(params), jax.jit(tx.update)

    def step(model: Any, optimizer: Any, grads: Any) -> None:
        optimizer.update(model, grads)

    run = nnx.jit(step) if compiled else step
    for number in range(3):
        grads = normal_like(params, number)
        boxed = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(boxed, grads)
        run(model, optimizer, boxed)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    # Compiled apart, the two may round an update differently, and a code with it: of
    # one step in 127 the square, of a moment that a tenth of a step comes from.
    found = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_same(found, params, tolerance=2e-3)
    assert len(coded(nnx.as_pure(optimizer.opt_state))) == len(coded(state)) == 10


@every
def test_in_boxes_of_linen_with_specs(make: Any) -> None:
    nn = pytest.importorskip("flax.linen")
    init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    bias = nn.with_partitioning(nn.initializers.normal(), ("mlp",))
    table = nn.with_partitioning(nn.initializers.normal(), ("vocab", "embed"))
    params = {
        **nn.Dense(32, kernel_init=init, bias_init=bias).init(
            jax.random.key(0), jnp.ones((1, 16))
        )["params"],
        "embedding": nn.Embed(20, 16, embedding_init=table).init(
            jax.random.key(1), jnp.zeros(1, int)
        )["params"]["embedding"],
    }
    tx, plain = make(), nn.unbox(params)
    mesh = jax.make_mesh((2, 2, 1), ("embed", "mlp", "vocab"))
    abstract = jax.eval_shape(tx.init, params)
    specs = nn.get_partition_spec(abstract)
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), specs)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    update = jax.jit(tx.update, out_shardings=(None, shardings))
    exact, plain_update = tx.init(plain), jax.jit(tx.update)
    for number in range(3):
        grads = normal_like(params, number)
        updates, state = update(grads, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        expected, exact = plain_update(nn.unbox(grads), exact, plain)
        assert_same(nn.unbox(updates), expected, tolerance=2e-3)
    assert all(isinstance(x.codes, jax.Array) for x in coded(state))


@every
def test_an_integer_leaf_is_left_as_optax_leaves_it(make: Any) -> None:
    params = {"kernel": normal(0, (16, 64)), "steps": jnp.arange(3)}
    tx, exact = make(), UNCODED[make]()
    state, expected_state = tx.init(params), exact.init(params)
    for number in range(3):
        grads = {"kernel": normal(number, (16, 64)), "steps": jnp.ones(3, int)}
        updates, state = tx.update(grads, state, params)
        expected, expected_state = exact.update(grads, expected_state, params)
        assert updates["steps"].dtype == expected["steps"].dtype
        np.testing.assert_allclose(updates["steps"], expected["steps"], rtol=1e-5)


def test_a_state_without_codes_is_refused() -> None:
    params = {"w": normal(0, (64, 128))}
    tx = go.quantized(optax.adamw(LR))
    with pytest.raises(ValueError, match=r"expects .*_Companded.* 0/mu/w float32\[64,"):
        tx.update(params, optax.adamw(LR).init(params), params)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.adagrad(LR, initial_accumulator_value=0.1),
        lambda: optax.yogi(LR),
        lambda: optax.rmsprop(LR, initial_scale=0.5),
        lambda: optax.inject_hyperparams(optax.adagrad)(LR),
        lambda: optax.masked(optax.adam(LR), {"w": True, "b": False}),
        lambda: optax.contrib.schedule_free(optax.sgd(LR, momentum=0.9), LR),
        lambda: optax.add_noise(0.1, 0.1, jax.random.key(3)),
    ],
    ids=["adagrad", "yogi", "rmsprop", "inject", "masked", "schedule_free", "keys"],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_the_first_state_is_that_of_the_inner(make: Any, compiled: bool) -> None:
    """Whatever fills its moments; what is no moment is bit for bit the inner's."""
    inner = optax.chain(optax.trace(0.9), make())
    params = {"w": normal(0, (64, 128), jnp.bfloat16), "b": jnp.ones(5)}
    tx = go.quantized(inner)
    found = (jax.jit(tx.init) if compiled else tx.init)(params)

    def compare(x: Any, y: Any) -> None:
        if not is_coded(x):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(*map(_plain, (x, y)))
            return
        assert x.codes.shape == y.shape
        if x.codes.dtype == y.dtype:
            np.testing.assert_array_equal(x.codes, y)
            return
        signed = x.codes.dtype == jnp.int8
        expected = companded().encode(y.astype(jnp.float32), signed)
        jax.tree.map(np.testing.assert_array_equal, x, expected)

    jax.tree.map(compare, found, inner.init(params), is_leaf=is_coded)


def _plain(x: Any) -> Any:
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(x) if is_key else x


def primitives(jaxpr: Any) -> set[str]:
    """Those of a jaxpr and of all that it calls."""
    found = set()
    for equation in jaxpr.eqns:
        found.add(equation.primitive.name)
        for inside in jaxprs_in_params(equation.params):
            found |= primitives(inside)
    return found


def test_zeros_are_stored_without_arithmetic() -> None:
    """XLA would do it while compiling, for 13 s a leaf of 2048 x 2048."""
    params = {"w": jnp.ones((64, 128)), "b": jnp.ones(5)}
    tx = go.quantized(optax.adamw(LR))
    assert primitives(jax.make_jaxpr(tx.init)(params).jaxpr) <= {"broadcast_in_dim"}


def test_an_update_calls_one_code_for_leaves_of_one_shape() -> None:
    traced = []

    class Counted(type(companded())):  # type: ignore[misc]
        def encode(self, x: jax.Array, signed: bool) -> Quantized:
            traced.append(x.shape)
            return super().encode(x, signed)

    params = {f"w{i}": normal(i, (64, 72)) for i in range(6)}
    tx = go.quantized(optax.adam(LR), code=Counted(None, 64))
    jax.make_jaxpr(tx.update)(params, tx.init(params))
    assert len(traced) == 2  # signed and unsigned


def test_zeros_lie_where_their_parameters_lie() -> None:
    mesh = jax.make_mesh((4,), ("x",))
    sharding = jax.NamedSharding(mesh, jax.P(None, "x"))
    params = {"w": jax.device_put(normal(0, (64, 1024)), sharding)}
    moment = go.quantized(optax.adam(LR)).init(params)[0].mu["w"]
    assert moment.codes.sharding.is_equivalent_to(sharding, 2)
    assert moment.scales.sharding.is_equivalent_to(sharding, 2)
