# SPDX-License-Identifier: Apache-2.0
"""The planner's LLaMA is the one of the example, and its step trains."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import memory
from galore_optax.layerwise import Params
from galore_optax.memory import Sizes
from galore_optax.memory._step import layerwise_step, loss_of, plain_step

SIZES = Sizes(vocab=50, width=16, hidden=24, layers=3, heads=2)
TOKENS = np.random.default_rng(0).integers(0, 50, (4, 13)).astype(np.int32)


def random_params(sizes: Sizes = SIZES, seed: int = 0) -> Params:
    leaves, treedef = jax.tree.flatten(memory.shapes(sizes, "float32"))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    values = [
        (len(x.shape) < 3 and x.shape[-1] == sizes.width)
        + 0.3 * jax.random.normal(key, x.shape)
        for key, x in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(values)


def test_loss_is_that_of_the_example() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="needs the extra examples")
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "llama"))
    import model as example

    config = example.Config(
        vocab=50, width=16, hidden=24, layers=3, heads=2, max_tokens=64
    )
    theirs = example.LLaMA(config, nnx.Rngs(0))
    params = random_params()
    nnx.update(theirs, _as_nnx(params))
    logits = nnx.jit(lambda model, x: model(x))(theirs, TOKENS[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, TOKENS[:, 1:])
    found = jax.jit(loss_of(memory.model(SIZES), remat=False))(params, TOKENS)
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
        jax.jit(jax.grad(loss_of(memory.model(SIZES), remat)))(random_params(), TOKENS)
        for remat in (False, True)
    ]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *for_each)


@pytest.mark.parametrize("key_heads", [1, 2])
def test_grouped_queries_run(key_heads: int) -> None:
    sizes = dataclasses.replace(SIZES, heads=4, key_heads=key_heads, head_size=6)
    params = random_params(sizes)
    assert params.blocks["attn"]["k"]["kernel"].shape == (3, 16, 6 * key_heads)
    loss = jax.eval_shape(loss_of(memory.model(sizes), False), params, TOKENS)
    assert (loss.shape, loss.dtype) == ((), jnp.float32)


def test_the_step_trains_and_parts_add_up() -> None:
    init, step = plain_step(memory.model(SIZES), optax.sgd(0.1), remat=True)
    params, step = random_params(), jax.jit(step)
    whole, state, loss = step(params, init(params), TOKENS[None])
    parted, _, mean = step(params, init(params), TOKENS.reshape(2, 2, 13))
    np.testing.assert_allclose(loss, mean, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), whole, parted
    )
    assert step(whole, state, TOKENS[None])[2] < loss


def test_a_layerwise_step_is_the_plain_one() -> None:
    params, found = random_params(), []
    for make in (plain_step, layerwise_step):
        init, step = make(memory.model(SIZES), optax.sgd(0.1), remat=True)
        found.append(jax.jit(step)(params, init(params), TOKENS[None])[0])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), *found)


def test_all_configurations_load() -> None:
    sizes = {name: Sizes.load(name) for name in memory.config_names()}
    assert {"9m", "130m", "7b", "13b", "demo"} <= set(sizes)
    weights = {n: memory.tree_bytes(memory.shapes(s)) / 2e6 for n, s in sizes.items()}
    assert round(weights["7b"], 2) == 6738.42
    assert round(weights["60m"], 2) == 58.07


def test_a_config_of_grouped_queries_loads(tmp_path: Path) -> None:
    found = json.loads(memory.config_path("demo").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(found | {"num_key_value_heads": 2, "head_dim": 32})
    )
    sizes = Sizes.load(str(tmp_path / "config.json"))
    assert (sizes.key_width, sizes.query_width) == (64, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"hidden_size": 250, "num_attention_heads": 4}, "hidden_size=250"),
        ({"head_dim": 3}, "head_dim=3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_configs_that_are_no_llama_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    found = json.loads(memory.config_path("demo").read_text()) | change
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        Sizes.load(str(path))


def test_an_unknown_model_is_told_the_nearest() -> None:
    with pytest.raises(FileNotFoundError, match="Did you mean '130m'"):
        Sizes.load("130mm")
