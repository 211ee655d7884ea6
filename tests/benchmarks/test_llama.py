# SPDX-License-Identifier: Apache-2.0
"""The LLaMA that is compiled is the one of the example, and its step trains."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.lib.llama import model
from benchmarks.lib.training_steps import abstract, loss_of, step_of
from galore_optax import memory
from galore_optax.layerwise import Params
from galore_optax.memory import Setting, Sizes
from galore_optax.memory._plan import activations
from tests.helpers import normal_like

SIZES = Sizes(vocab=50, width=16, hidden=24, layers=3, heads=2)
TOKENS = np.random.default_rng(0).integers(0, 50, (4, 13)).astype(np.int32)


def random_params(sizes: Sizes = SIZES, seed: int = 0) -> Params:
    noise = normal_like(memory.shapes(sizes, "float32"), seed)
    return jax.tree.map(
        lambda x: (x.ndim < 3 and x.shape[-1] == sizes.width) + 0.3 * x, noise
    )


def test_loss_is_that_of_the_example() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="needs the extra examples")
    example = pytest.importorskip("model", reason="of the example")
    config = example.Config(
        vocab=50, width=16, hidden=24, layers=3, heads=2, max_tokens=64
    )
    theirs = example.LLaMA(config, nnx.Rngs(0))
    params = random_params()
    nnx.update(theirs, _as_nnx(params))
    logits = nnx.jit(lambda model, x: model(x))(theirs, TOKENS[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:])
    found = jax.jit(loss_of(SIZES, remat=False))(params, TOKENS)
    assert np.std(losses) > 0.1
    # 1e-5 for f32 sums of at most 50 terms in another order.
    np.testing.assert_allclose(found, losses.mean(), rtol=1e-5)


def _as_nnx(params: Params) -> Any:
    return {
        "embed": params.embed,
        "layers": params.blocks,
        "norm": params.head["norm"],
        "lm_head": {"kernel": params.head["kernel"]},
    }


def test_remat_changes_no_gradient() -> None:
    for_each = [
        jax.jit(jax.grad(loss_of(SIZES, remat)))(random_params(), TOKENS)
        for remat in (False, True)
    ]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *for_each)


@pytest.mark.parametrize("key_heads", [1, 2])
def test_grouped_queries_run(key_heads: int) -> None:
    sizes = dataclasses.replace(SIZES, heads=4, key_heads=key_heads, head_size=6)
    params = random_params(sizes)
    assert params.blocks["attn"]["k"]["kernel"].shape == (3, 16, 6 * key_heads)
    loss = jax.eval_shape(loss_of(sizes, False), params, TOKENS)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)


def test_the_step_trains_and_parts_add_up() -> None:
    tx = optax.sgd(0.1)
    params, step = random_params(), jax.jit(step_of(SIZES, tx, Setting(remat=True)))
    whole, state, loss = step(params, tx.init(params), TOKENS[None])
    parted, _, mean = step(params, tx.init(params), TOKENS.reshape(2, 2, 13))
    np.testing.assert_allclose(loss, mean, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), whole, parted
    )
    assert step(whole, state, TOKENS[None])[2] < loss


@pytest.mark.parametrize("how", [{"layerwise": True}, {"gradients": "never"}])
def test_steps_of_every_kind_are_the_plain_one(how: dict[str, Any]) -> None:
    params, tx, found = random_params(), optax.sgd(0.1), []
    for setting in (Setting(remat=True), Setting(remat=True, **how)):
        shapes = abstract(SIZES, tx, setting)[1]
        state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        step = jax.jit(step_of(SIZES, tx, setting))
        found.append(step(params, state, TOKENS[None])[0])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *found)


# All widths differ: D 32, F 80, H·K 48, G·K 24.
UNEQUAL = Sizes(96, 32, 80, 3, heads=4, key_heads=2, head_size=12)


def saved_by_jax(sizes: Sizes, setting: Setting) -> tuple[int, int]:
    """Bytes that the backward pass of a layer needs, (without, of) scores."""
    blocks = memory.shapes(sizes, setting.dtype).blocks
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), blocks)
    shape = (setting.batch, setting.tokens)
    x = jax.ShapeDtypeStruct((*shape, sizes.width), jnp.dtype(setting.dtype))
    batch = jax.ShapeDtypeStruct(shape, jnp.int32)
    block = model(sizes).block
    saved = jax.eval_shape(
        lambda p, x, b: jax.vjp(lambda p, x: block(p, x, b), p, x)[1], layer, x, batch
    )
    count = setting.batch * setting.tokens
    widths = {sizes.width, sizes.hidden, sizes.query_width, sizes.key_width}
    found = [leaf for leaf in jax.tree.leaves(saved) if leaf.dtype != bool]
    rows = [leaf for leaf in found if leaf.size in {count * width for width in widths}]
    scores = [x for x in found if x.size == sizes.heads * setting.tokens * count]
    return memory.tree_bytes(rows), memory.tree_bytes(scores)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_saved_activations_are_those_of_jax(dtype: str) -> None:
    setting = Setting(tokens=56, batch=5, dtype=dtype)
    rows, scores = saved_by_jax(UNEQUAL, setting)
    s, entries = setting.itemsize, 4 * 56 * 5 * 56
    saved = activations(UNEQUAL, setting).saved
    assert saved == 3 * (rows + (4 + s) * entries)
    # JAX names one more f32 copy of the scores, which XLA finds to be the same.
    assert scores == (8 + s) * entries
