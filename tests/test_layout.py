# SPDX-License-Identifier: Apache-2.0
"""The default rule on the layouts of real libraries."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax as go
from galore_optax._selection.layout import recognise
from tests.layout_trees import TREES, Tree


def kinds(tree: Any) -> dict[str, Any]:
    """By path: (rows, cols) of what is recognised, the reason of what is not."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shapes[name.removesuffix("/value")] = leaf.shape
    return {
        path: (v.axes.rows, v.axes.cols) if v.axes else v.reason
        for path, v in recognise(shapes).items()
    }


def shapes(tree: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        path: (v.axes.rows, v.axes.cols) if v.axes else v.reason
        for path, v in recognise(tree).items()
    }


def test_bare_matrices_are_taken_as_given() -> None:
    assert shapes({"": (8, 4)}) == {"": ((0,), (1,))}
    assert shapes({"a": (8, 4), "b": (4,)}) == {"a": ((0,), (1,)), "b": "vector"}


def test_linen() -> None:
    nn = pytest.importorskip("flax.linen")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            x = nn.Embed(50, 16)(tokens)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
            x = nn.Dense(16)(nn.Dense(40)(x))
            x = nn.Conv(16, (3,))(x)
            return nn.Dense(50)(x)

    tree = jax.eval_shape(Model().init, jax.random.key(0), jnp.ones((1, 4), int))
    found = kinds(tree["params"])
    attention = "MultiHeadDotProductAttention_0"
    assert found == {
        "Embed_0/embedding": "embedding",
        "LayerNorm_0/scale": "norm",
        "LayerNorm_0/bias": "bias",
        **{
            f"{attention}/{n}/kernel": ((1, 2), (0,)) for n in ("query", "key", "value")
        },
        **{f"{attention}/{n}/bias": "bias" for n in ("query", "key", "value", "out")},
        f"{attention}/out/kernel": ((2,), (0, 1)),
        **{f"Dense_{i}/bias": "bias" for i in range(3)},
        "Dense_0/kernel": ((1,), (0,)),
        "Dense_1/kernel": ((1,), (0,)),
        "Conv_0/kernel": "convolution",
        "Conv_0/bias": "bias",
        "Dense_2/kernel": "head",
    }


def test_linen_scanned() -> None:
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.RMSNorm()(x))
            return nn.Dense(16)(nn.Dense(40)(x)), None

    class Model(nn.Module):
        axis: int = 0

        @nn.compact
        def __call__(self, x: Any) -> Any:
            scan = nn.scan(
                Block,
                variable_axes={"params": self.axis},
                split_rngs={"params": True},
                length=3,
                in_axes=nn.broadcast,
            )
            return scan(name="layers")(x, None)[0]

    for axis in (0, 1):
        tree = jax.eval_shape(Model(axis).init, jax.random.key(0), jnp.ones((1, 4, 16)))
        found = kinds(tree["params"])
        attention = "layers/MultiHeadDotProductAttention_0"
        embed, heads, size = (1, 2, 3) if axis == 0 else (0, 2, 3)
        assert found[f"{attention}/query/kernel"] == ((heads, size), (embed,))
        heads, size, embed = (1, 2, 3) if axis == 0 else (0, 2, 3)
        assert found[f"{attention}/out/kernel"] == ((embed,), (heads, size))
        assert found["layers/Dense_0/kernel"] == ((2,), (1 - axis,))
        assert found["layers/RMSNorm_0/scale"] == "norm"
        assert found[f"{attention}/query/bias"] == "bias"


def test_nnx() -> None:
    nnx = pytest.importorskip("flax.nnx")

    class Block(nnx.Module):
        def __init__(self, rngs: Any):
            self.norm = nnx.RMSNorm(16, rngs=rngs)
            self.attn = nnx.MultiHeadAttention(2, 16, rngs=rngs, decode=False)
            self.up = nnx.Linear(16, 40, rngs=rngs)

    class Model(nnx.Module):
        def __init__(self, rngs: Any):
            @nnx.split_rngs(splits=3)
            @nnx.vmap(in_axes=0, out_axes=0)
            def stack(rngs: Any) -> Block:
                return Block(rngs)

            self.embed = nnx.Embed(50, 16, rngs=rngs)
            self.layers = stack(rngs)
            self.single = Block(rngs)
            self.head = nnx.Linear(16, 50, use_bias=False, rngs=rngs)

    found = kinds(nnx.state(Model(nnx.Rngs(0)), nnx.Param))
    assert found["embed/embedding"] == "embedding"
    assert found["layers/up/kernel"] == ((2,), (1,))
    assert found["layers/attn/query/kernel"] == ((2, 3), (1,))
    assert found["layers/attn/out/kernel"] == ((3,), (1, 2))
    assert found["layers/norm/scale"] == "norm"
    assert found["single/attn/query/kernel"] == ((1, 2), (0,))
    assert found["single/attn/out/kernel"] == ((2,), (0, 1))
    assert found["single/up/kernel"] == ((1,), (0,))
    assert found["head/kernel"] == "head"


def test_equinox() -> None:
    eqx = pytest.importorskip("equinox")

    class Block(eqx.Module):
        norm: eqx.nn.LayerNorm
        attn: eqx.nn.MultiheadAttention
        up: eqx.nn.Linear

        def __init__(self, key: Any):
            self.norm = eqx.nn.LayerNorm(16)
            self.attn = eqx.nn.MultiheadAttention(2, 16, key=key)
            self.up = eqx.nn.Linear(16, 40, key=key)

    class Model(eqx.Module):
        embed: eqx.nn.Embedding
        blocks: Block
        single: list[Block]
        conv: eqx.nn.Conv1d
        head: eqx.nn.Linear

        def __init__(self, key: Any):
            self.embed = eqx.nn.Embedding(50, 16, key=key)
            self.blocks = eqx.filter_vmap(Block)(jax.random.split(key, 3))
            self.single = [Block(key)]
            self.conv = eqx.nn.Conv1d(16, 16, 3, key=key)
            self.head = eqx.nn.Linear(16, 50, key=key)

    found = kinds(eqx.filter(Model(jax.random.key(0)), eqx.is_inexact_array))
    assert found["embed/weight"] == "embedding"
    assert found["blocks/up/weight"] == ((1,), (2,))
    assert found["blocks/attn/query_proj/weight"] == ((1,), (2,))
    assert found["blocks/norm/weight"] == "norm"
    assert found["single/0/up/weight"] == ((0,), (1,))
    assert found["conv/weight"] == "convolution"
    assert found["head/weight"] == "head"


def test_maxtext() -> None:
    # Layer axis second; names and shapes as its scanned decoder has them.
    found = shapes(
        {
            "token_embedder/embedding": (100, 16),
            "decoder/layers/pre_self_attention_layer_norm/scale": (16, 6),
            "decoder/layers/self_attention/query/kernel": (16, 6, 4, 8),
            "decoder/layers/self_attention/key/kernel": (16, 6, 2, 8),
            "decoder/layers/self_attention/out/kernel": (4, 6, 8, 16),
            "decoder/layers/mlp/wi_0/kernel": (16, 6, 40),
            "decoder/layers/mlp/wo/kernel": (40, 6, 16),
            "decoder/layers/MoeBlock_0/wi_0": (3, 6, 16, 40),
            "decoder/layers/MoeBlock_0/wo": (3, 6, 40, 16),
            "decoder/decoder_norm/scale": (16,),
            "decoder/logits_dense/kernel": (16, 100),
        }
    )
    assert found == {
        "token_embedder/embedding": "embedding",
        "decoder/layers/pre_self_attention_layer_norm/scale": "norm",
        "decoder/layers/self_attention/query/kernel": ((2, 3), (0,)),
        "decoder/layers/self_attention/key/kernel": ((2, 3), (0,)),
        "decoder/layers/self_attention/out/kernel": ((3,), (0, 2)),
        "decoder/layers/mlp/wi_0/kernel": ((2,), (0,)),
        "decoder/layers/mlp/wo/kernel": ((2,), (0,)),
        "decoder/layers/MoeBlock_0/wi_0": ((3,), (2,)),
        "decoder/layers/MoeBlock_0/wo": ((3,), (2,)),
        "decoder/decoder_norm/scale": "norm",
        "decoder/logits_dense/kernel": "head",
    }


def test_an_mlp_as_wide_as_the_vocabulary_is_no_head() -> None:
    found = shapes(
        {
            "embed/embedding": (64, 16),
            "a/up/kernel": (16, 64),
            "a/down/kernel": (64, 16),
            "b/up/kernel": (16, 64),
            "b/down/kernel": (64, 16),
        }
    )
    assert found["a/up/kernel"] == found["b/up/kernel"] == ((1,), (0,))


def test_no_head_by_size_where_one_is_named_or_the_size_is_a_hidden_width() -> None:
    # 256 bytes are the vocabulary, and the width of the MLP.
    block = {
        "embed/embedding": (256, 64),
        "block/up/kernel": (64, 256),
        "block/down/kernel": (256, 64),
    }
    named = shapes({**block, "lm_head/kernel": (64, 256)})
    tied = shapes(block)
    assert named["lm_head/kernel"] == "head"
    assert named["block/up/kernel"] == tied["block/up/kernel"] == ((1,), (0,))
    one_way = {"embed/embedding": (256, 64), "up/kernel": (64, 256)}
    assert shapes(one_way)["up/kernel"] == "head"
    named = shapes({**one_way, "head/kernel": (64, 10)})
    assert named["up/kernel"] == ((1,), (0,))


@pytest.mark.parametrize(
    "name",
    [
        "multi_head_attention/kernel",
        "multi_head/kernel",
        "MultiHead_0/kernel",
        "member/w",
        "scaled/w",
        "moe/dispatch/kernel",
        "converter/kernel",
        "converter/up",
        "normal_proj",
        "normal_proj/kernel",
        "norm_proj/kernel",
        "embed_proj/kernel",
        "pos_proj/kernel",
        "adaLN_modulation/kernel",
        "text_embedder/block/kernel",
        "text_embedder/layers/0/up/kernel",
        "text_embedder/kernel",
        "to_latents/kernel",
        "prompt_encoder/up/kernel",
        "position_mlp/kernel",
        "dt_proj/kernel",
        "talking_head/kernel",
        "conversion",
        "normalizer_in/w",
        "B",
        "C",
    ],
)
def test_names_that_only_look_special(name: str) -> None:
    assert not isinstance(shapes({name: (8, 4)})[name], str)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("codebook", "codebook"),
        ("quantizer/codebooks/0", "codebook"),
        ("A_log", "state space"),
        ("log_dt", "state space"),
        ("pos", "position"),
        ("pos/w", "position"),
        ("pos_table", "position"),
        ("position", "position"),
        ("attn/relative_position_bias_table", "position"),
        ("rel_bias_table", "position"),
        ("prompt", "prompt"),
        ("soft_prompt/weight", "prompt"),
        ("latents", "latents"),
        ("cls_token", "token"),
        ("mask_token", "token"),
        ("register_tokens", "token"),
        ("lookup_table", "table"),
        ("wpe", "embedding"),
        ("tokenEmbedding/weight", "embedding"),
        ("embed/tok/w", "embedding"),
        ("token_embedder/weight", "embedding"),
        ("patch_embed/proj/kernel", "embedding"),
        ("preNorm/weight", "norm"),
        ("qnorm/weight", "norm"),
        ("ln_1/weight", "norm"),
        ("LayerNorm_0/weight", "norm"),
        ("Conv_0/kernel", "convolution"),
        ("dwconv/kernel", "convolution"),
        ("lm_head/dense/kernel", "head"),
        ("head_0/kernel", "head"),
        ("score/kernel", "head"),
        ("unembed/kernel", "head"),
        ("in_proj_bias", "bias"),
    ],
)
def test_what_is_no_linear_map_says_so(name: str, reason: str) -> None:
    assert shapes({name: (8, 4)}) == {name: reason}


def test_state_space_matrices_are_known_by_their_neighbours() -> None:
    s4 = {"s4/A": (8, 4), "s4/B": (8, 4), "s4/log_step": (8, 1), "lora/A": (8, 4)}
    found = shapes(s4)
    assert found["s4/A"] == found["s4/B"] == found["s4/log_step"] == "state space"
    assert found["lora/A"] == ((0,), (1,))


WEIGHT = ((1,), (2,))


@pytest.mark.parametrize("out", [256, 64])
def test_stacks_written_by_hand(out: int) -> None:
    stack = {
        "wte": (100, 64),
        "blocks/w1": (4, 64, 256),
        "blocks/b1": (4, 256),
        "blocks/w2": (4, 256, 64),
        "blocks/b2": (4, out),
    }
    expected = {"w1": WEIGHT, "b1": "vector", "w2": WEIGHT, "b2": "vector"}
    assert shapes(stack) == {
        "wte": "embedding",
        **{f"blocks/{name}": verdict for name, verdict in expected.items()},
    }
    elsewhere = {path.replace("blocks", "net"): s for path, s in stack.items()}
    assert shapes(elsewhere)["net/w1"] == WEIGHT
    assert shapes(elsewhere)["net/b1"] == "vector"


def test_a_stack_is_known_by_its_name() -> None:
    squares = {"layers/wq": (4, 8, 8), "layers/gain": (4, 8), "layers/wo": (4, 8, 8)}
    found = {"layers/wq": WEIGHT, "layers/gain": "vector", "layers/wo": WEIGHT}
    assert shapes(squares) == found
    # Not by sharing a width with its neighbours, nor where the layers are apart.
    experts = {"moe/w1": (4, 8, 16), "moe/router": (4, 8)}
    assert shapes(experts)["moe/router"] == ((1,), (0,))
    apart = {"layers/0/w": (4, 8, 8), "layers/0/v": (4, 8)}
    assert shapes(apart) == {"layers/0/w": "unknown layout", "layers/0/v": ((0,), (1,))}
    heads = {"layers/query/kernel": (8, 2, 4), "layers/key/kernel": (8, 2, 4)}
    assert shapes(heads)["layers/query/kernel"] == ((1, 2), (0,))


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_trees_of_real_models(tree: Tree) -> None:
    found = recognise({path: shape for path, (shape, _, _) in tree.items()})
    assert {path: (v.reason, v.axes and v.axes.both) for path, v in found.items()} == {
        path: (reason, axes) for path, (_, reason, axes) in tree.items()
    }


def test_unknown_leaves_of_three_axes_stay_full_and_are_named() -> None:
    params = {"w": jnp.ones((8, 16)), "odd": jnp.ones((4, 5, 6))}
    report = go.describe(go.galore(optax.adam(1.0), rank=2), params)
    assert [leaf.rank for leaf in report] == [0, 2]
    assert any(
        "'odd'" in text and "axes are unknown" in text for text in report.warnings
    )
