# SPDX-License-Identifier: Apache-2.0
"""Parameter trees of real models, as shapes, and what every leaf of them is.

One layer of each kind, or two where layers are scanned. A leaf is its shape and, by
the kind of map, the axes `(rows, cols)` or the reason why it stays at full size.
"""

from typing import TypeAlias

Shape: TypeAlias = tuple[int, ...]
Axes: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
Tree: TypeAlias = dict[str, tuple[Shape, str, Axes | None]]


def _under(prefix: str, *trees: Tree) -> Tree:
    return {f"{prefix}/{path}": leaf for tree in trees for path, leaf in tree.items()}


def _dense(name: str, shape: Shape, bias: bool = False) -> Tree:
    """`nn.Dense`: kernel (in, out)."""
    tree: Tree = {f"{name}/kernel": (shape, "matrix", ((1,), (0,)))}
    return {**tree, **({f"{name}/bias": (shape[1:], "bias", None)} if bias else {})}


def _norm(name: str, width: int, bias: bool = False, leaf: str = "scale") -> Tree:
    tree: Tree = {f"{name}/{leaf}": ((width,), "norm", None)}
    return {**tree, **({f"{name}/bias": ((width,), "bias", None)} if bias else {})}


def _attention(width: int, heads: int, size: int) -> Tree:
    """`nn.MultiHeadDotProductAttention`, with biases."""
    tree: Tree = {
        "out/kernel": ((heads, size, width), "attention", ((2,), (0, 1))),
        "out/bias": ((width,), "bias", None),
    }
    for name in ("query", "key", "value"):
        tree[f"{name}/kernel"] = (width, heads, size), "attention", ((1, 2), (0,))
        tree[f"{name}/bias"] = (heads, size), "bias", None
    return tree


# AI-Hypercomputer/maxtext, its scanned LLaMA decoder: the layer axis is the second.
MAXTEXT: Tree = {
    "params/token_embedder/embedding": ((32000, 4096), "embedding", None),
    **_under(
        "params/decoder/layers",
        {
            "pre_self_attention_layer_norm/scale": ((4096, 2), "norm", None),
            "post_self_attention_layer_norm/scale": ((4096, 2), "norm", None),
            "self_attention/query/kernel": (
                (4096, 2, 32, 128),
                "attention",
                ((2, 3), (0,)),
            ),
            "self_attention/key/kernel": (
                (4096, 2, 8, 128),
                "attention",
                ((2, 3), (0,)),
            ),
            "self_attention/value/kernel": (
                (4096, 2, 8, 128),
                "attention",
                ((2, 3), (0,)),
            ),
            "self_attention/out/kernel": (
                (32, 2, 128, 4096),
                "attention",
                ((3,), (0, 2)),
            ),
            "mlp/wi_0/kernel": ((4096, 2, 14336), "stacked", ((2,), (0,))),
            "mlp/wi_1/kernel": ((4096, 2, 14336), "stacked", ((2,), (0,))),
            "mlp/wo/kernel": ((14336, 2, 4096), "stacked", ((2,), (0,))),
        },
    ),
    "params/decoder/decoder_norm/scale": ((4096,), "norm", None),
    "params/decoder/logits_dense/kernel": ((4096, 32000), "head", None),
}

# google-deepmind/gemma, `gemma.gm.nn`: Gemma 3 4B; the head is the embedding.
_GEMMA_LAYER: Tree = {
    "attn/q_einsum/w": ((8, 2560, 256), "attention", ((0, 2), (1,))),
    "attn/kv_einsum/w": ((2, 4, 2560, 256), "attention", ((1, 3), (2,))),
    "attn/attn_vec_einsum/w": ((8, 256, 2560), "attention", ((2,), (0, 1))),
    "attn/_query_norm/scale": ((256,), "norm", None),
    "attn/_key_norm/scale": ((256,), "norm", None),
    "mlp/gating_einsum": ((2, 10240, 2560), "stacked", ((1,), (2,))),
    "mlp/linear": ((10240, 2560), "matrix", ((0,), (1,))),
    **_norm("pre_attention_norm", 2560),
    **_norm("post_attention_norm", 2560),
    **_norm("pre_ffw_norm", 2560),
    **_norm("post_ffw_norm", 2560),
}
GEMMA: Tree = {
    "embedder/input_embedding": ((262144, 2560), "embedding", None),
    **_under("layer_0", _GEMMA_LAYER),
    **_under("layer_1", _GEMMA_LAYER),
    **_norm("final_norm", 2560),
}

# The same with as many key heads as query heads (Gemma 7B).
GEMMA_FUSED: Tree = {
    "embedder/input_embedding": ((256128, 3072), "embedding", None),
    "layer_0/attn/qkv_einsum/w": ((3, 16, 3072, 256), "attention", ((1, 3), (2,))),
    "layer_0/attn/attn_vec_einsum/w": ((16, 256, 3072), "attention", ((2,), (0, 1))),
    **_norm("layer_0/pre_attention_norm", 3072),
    **_norm("final_norm", 3072),
}

# AI-Hypercomputer/maxtext, `layers/qwen3.py`: Qwen3-Next, scanned over cycles of
# layers: gated delta nets, attention, routed and shared experts.
_QWEN_EXPERTS: Tree = {
    "routed_experts/gate/kernel": ((2048, 2, 512), "stacked", ((2,), (0,))),
    "routed_experts/wi_0": ((512, 2, 2048, 768), "experts", ((3,), (2,))),
    "routed_experts/wi_1": ((512, 2, 2048, 768), "experts", ((3,), (2,))),
    "routed_experts/wo": ((512, 2, 768, 2048), "experts", ((3,), (2,))),
    "shared_expert/wi_0/kernel": ((2048, 2, 768), "stacked", ((2,), (0,))),
    "shared_expert/wi_1/kernel": ((2048, 2, 768), "stacked", ((2,), (0,))),
    "shared_expert/wo/kernel": ((768, 2, 2048), "stacked", ((2,), (0,))),
    "shared_expert_gate/kernel": ((2048, 2, 1), "stacked", ((2,), (0,))),
}
QWEN: Tree = {
    "token_embedder/embedding": ((151936, 2048), "embedding", None),
    **_under(
        "decoder/layers",
        {
            "layer_0/input_layernorm/scale": ((2048, 2), "norm", None),
            "layer_0/attention/in_proj_qkvz/kernel": (
                (2048, 2, 12288),
                "stacked",
                ((2,), (0,)),
            ),
            "layer_0/attention/in_proj_ba/kernel": (
                (2048, 2, 64),
                "stacked",
                ((2,), (0,)),
            ),
            "layer_0/attention/conv1d/kernel": ((4, 2, 1, 8192), "convolution", None),
            "layer_0/attention/A_log": ((32, 2), "vector", None),
            "layer_0/attention/dt_bias": ((32, 2), "bias", None),
            "layer_0/attention/norm/rms_norm/scale": ((128, 2), "norm", None),
            "layer_0/attention/out_proj/kernel": (
                (4096, 2, 2048),
                "stacked",
                ((2,), (0,)),
            ),
            **_under("layer_0/mlp", _QWEN_EXPERTS),
            "layer_3/self_attention/query/kernel": (
                (2048, 2, 16, 512),
                "attention",
                ((2, 3), (0,)),
            ),
            "layer_3/self_attention/query_norm/scale": ((256, 2), "norm", None),
            "layer_3/self_attention/out/kernel": (
                (16, 2, 256, 2048),
                "attention",
                ((3,), (0, 2)),
            ),
            **_under("layer_3/mlp", _QWEN_EXPERTS),
        },
    ),
    **_norm("decoder/decoder_norm", 2048),
    "decoder/logits_dense/kernel": ((2048, 151936), "head", None),
}

# kcoopermiller/mamba-minimal-jax (linen), 130M; the head is the embedding.
MAMBA: Tree = {
    "embedding/embedding": ((50280, 768), "embedding", None),
    **_under(
        "layers_0",
        _norm("norm", 768),
        _under(
            "mixer",
            _dense("in_proj", (768, 3072)),
            _dense("x_proj", (1536, 80)),
            _dense("dt_proj", (48, 1536), bias=True),
            _dense("out_proj", (1536, 768)),
            {
                "conv1d/kernel": ((4, 1, 1536), "convolution", None),
                "conv1d/bias": ((1536,), "bias", None),
                "A_log": ((1536, 16), "state space", None),
                "D": ((1536,), "vector", None),
            },
        ),
    ),
    **_norm("norm_f", 768),
}

# The same stacked by hand: one leading axis of layers.
MAMBA_STACKED: Tree = {
    "embed/weight": ((50280, 768), "embedding", None),
    **_under(
        "blocks",
        {
            "norm/weight": ((2, 768), "norm", None),
            "in_proj/weight": ((2, 3072, 768), "stacked", ((1,), (2,))),
            "conv1d/weight": ((2, 1536, 1, 4), "convolution", None),
            "A_log": ((2, 1536, 16), "state space", None),
            "D": ((2, 1536), "vector", None),
            "dt_bias": ((2, 1536), "bias", None),
            "out_proj/weight": ((2, 768, 1536), "stacked", ((1,), (2,))),
        },
    ),
}

# google-research/vision_transformer, ViT-B/16.
VIT: Tree = {
    "embedding/kernel": ((16, 16, 3, 768), "embedding", None),
    "embedding/bias": ((768,), "bias", None),
    "cls": ((1, 1, 768), "token", None),
    "Transformer/posembed_input/pos_embedding": ((1, 197, 768), "embedding", None),
    **_under(
        "Transformer/encoderblock_0",
        _norm("LayerNorm_0", 768, bias=True),
        _under("MultiHeadDotProductAttention_1", _attention(768, 12, 64)),
        _norm("LayerNorm_2", 768, bias=True),
        _under(
            "MlpBlock_3",
            _dense("Dense_0", (768, 3072), bias=True),
            _dense("Dense_1", (3072, 768), bias=True),
        ),
    ),
    **_norm("Transformer/encoder_norm", 768, bias=True),
    "head/kernel": ((768, 1000), "head", None),
    "head/bias": ((1000,), "bias", None),
}

# google-research/scenic, `projects/baselines/detr`.
DETR: Tree = {
    "backbone/stem_conv/kernel": ((7, 7, 3, 64), "convolution", None),
    "backbone/init_bn/scale": ((64,), "norm", None),
    "backbone/ResidualBlock_0/conv1/kernel": ((1, 1, 64, 64), "convolution", None),
    "Conv_0/kernel": ((1, 1, 2048, 256), "convolution", None),
    "Conv_0/bias": ((256,), "bias", None),
    "QueryPosEmbedding_0/query_emb": ((100, 256), "embedding", None),
    **_under(
        "DETRTransformer_0/decoder/decoderblock_0",
        _under("MultiHeadDotProductAttention_0", _attention(256, 8, 32)),
        _norm("LayerNorm_0", 256, bias=True),
        _under("MultiHeadDotProductAttention_1", _attention(256, 8, 32)),
        _under(
            "MlpBlock_0",
            _dense("Dense_0", (256, 2048), bias=True),
            _dense("Dense_1", (2048, 256), bias=True),
        ),
    ),
    "ObjectClassPredictor_0/Dense_0/kernel": ((256, 92), "matrix", ((1,), (0,))),
    **_dense("BBoxCoordPredictor_0/Dense_0", (256, 256), bias=True),
    **_dense("BBoxCoordPredictor_0/Dense_1", (256, 4), bias=True),
}

# Hugging Face transformers, `modeling_flax_t5.py`: T5 v1.1 base.
T5: Tree = {
    "shared/embedding": ((32128, 768), "embedding", None),
    **_under(
        "encoder/block/0/layer",
        _dense("0/SelfAttention/q", (768, 768)),
        _dense("0/SelfAttention/k", (768, 768)),
        _dense("0/SelfAttention/v", (768, 768)),
        _dense("0/SelfAttention/o", (768, 768)),
        {
            "0/SelfAttention/relative_attention_bias/embedding": (
                (32, 12),
                "embedding",
                None,
            )
        },
        _norm("0/layer_norm", 768, leaf="weight"),
        _dense("1/DenseReluDense/wi_0", (768, 2048)),
        _dense("1/DenseReluDense/wi_1", (768, 2048)),
        _dense("1/DenseReluDense/wo", (2048, 768)),
        _norm("1/layer_norm", 768, leaf="weight"),
    ),
    **_norm("encoder/final_layer_norm", 768, leaf="weight"),
    **_dense("decoder/block/0/layer/1/EncDecAttention/q", (768, 768)),
    **_norm("decoder/final_layer_norm", 768, leaf="weight"),
    "lm_head/kernel": ((768, 32128), "head", None),
}

# Hugging Face transformers, `modeling_flax_whisper.py`: base; the head is the
# embedding.
_WHISPER_LAYER: Tree = {
    **_dense("self_attn/k_proj", (512, 512)),
    **_dense("self_attn/q_proj", (512, 512), bias=True),
    **_dense("self_attn/v_proj", (512, 512), bias=True),
    **_dense("self_attn/out_proj", (512, 512), bias=True),
    **_norm("self_attn_layer_norm", 512, bias=True),
    **_dense("fc1", (512, 2048), bias=True),
    **_dense("fc2", (2048, 512), bias=True),
    **_norm("final_layer_norm", 512, bias=True),
}
WHISPER: Tree = {
    **_under(
        "model/encoder",
        {
            "conv1/kernel": ((3, 80, 512), "convolution", None),
            "conv1/bias": ((512,), "bias", None),
            "conv2/kernel": ((3, 512, 512), "convolution", None),
            "embed_positions/embedding": ((1500, 512), "embedding", None),
        },
        _under("layers/0", _WHISPER_LAYER),
        _norm("layer_norm", 512, bias=True),
    ),
    **_under(
        "model/decoder",
        {
            "embed_tokens/embedding": ((51865, 512), "embedding", None),
            "embed_positions/embedding": ((448, 512), "embedding", None),
        },
        _under("layers/0", _WHISPER_LAYER),
        _dense("layers/0/encoder_attn/q_proj", (512, 512), bias=True),
        _norm("layers/0/encoder_attn_layer_norm", 512, bias=True),
    ),
}

TREES = {
    "MaxText": MAXTEXT,
    "Gemma": GEMMA,
    "Gemma, one einsum": GEMMA_FUSED,
    "Qwen3-Next": QWEN,
    "Mamba": MAMBA,
    "Mamba, stacked": MAMBA_STACKED,
    "ViT": VIT,
    "DETR": DETR,
    "T5": T5,
    "Whisper": WHISPER,
}
