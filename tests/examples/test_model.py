# SPDX-License-Identifier: Apache-2.0
"""The model against Hugging Face's, the table of sizes, and the way there and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from galore_optax.memory import config_names, config_path
from tests.helpers import normal_like

import hugging_face
from model import SIZES, Config, LLaMA, Numerics, parameter_count

SMALL = Config(vocab=100, width=32, hidden=48, layers=3, heads=4, max_tokens=64)
# As SmolLM2: three queries to a key, the head's kernel the embedding, slower positions.
GROUPED = dataclasses.replace(
    SMALL, width=48, heads=6, key_heads=2, tied=True, rope_base=1e5, norm_eps=1e-5
)
BOTH = pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["plain", "grouped"])
PLAIN = Numerics()
MILLIONS = {
    "60m": 58.07,
    "130m": 134.11,
    "350m": 367.97,
    "1b": 1339.08,
    "7b": 6738.42,
}


def params_of(config: Config, seed: int = 0) -> Any:
    """Weights large enough that every part of the model matters."""
    state = nnx.state(LLaMA(config, nnx.Rngs(seed)), nnx.Param)
    weights = nnx.to_pure_dict(state)
    noise = normal_like(weights, seed)
    return jax.tree.map(lambda x, y: x + 0.2 * y, weights, noise)


def logits(
    params: Any, tokens: Any, numerics: Numerics = PLAIN, config: Config = SMALL
) -> Any:
    model = nnx.eval_shape(lambda: LLaMA(config, nnx.Rngs(0), numerics))
    graphdef, _ = nnx.split(model, nnx.Param)
    return nnx.merge(graphdef, nnx.State(params))(jnp.asarray(tokens))


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_counts_are_the_papers(name: str) -> None:
    model = nnx.eval_shape(lambda: LLaMA(Config.load(name), nnx.Rngs(0)))
    count = parameter_count(nnx.state(model, nnx.Param))
    assert round(count / 1e6, 2) == MILLIONS[name]


def test_every_config_loads() -> None:
    for name in config_names():
        found = json.loads(config_path(name).read_text())
        if "architectures" in found:
            assert Config.load(name).to_hugging_face() == found
        elif not (SIZES / f"{name}.json").is_file():  # the planner alone knows it
            with pytest.raises(ValueError, match=r"this LLaMA has|memory\s+planner"):
                Config.load(name)


def test_sizes_agree_with_those_of_the_planner() -> None:
    files = list(SIZES.glob("*.json"))
    assert "smollm2-135m" in {path.stem for path in files}
    for path in files:
        ours, theirs = (
            json.loads(x.read_text()) for x in (path, config_path(path.stem))
        )
        both = ours.keys() & theirs.keys()
        assert {"hidden_size", "num_key_value_heads", "tie_word_embeddings"} <= both
        assert {k: ours[k] for k in both} == {k: theirs[k] for k in both}
        assert Config.load(path.stem).to_hugging_face().items() >= ours.items()


@pytest.mark.slow
@BOTH
def test_logits_equal_those_of_transformers(tmp_path: Path, config: Config) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = params_of(config)
    hugging_face.write(tmp_path, params, config)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    tokens = np.random.default_rng(0).integers(0, 100, (2, 64))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    found = logits(params, tokens, config=config)
    assert np.std(expected) > 0.5  # or 1e-4 would say little
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
@BOTH
def test_weights_of_transformers_are_read(tmp_path: Path, config: Config) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = transformers.LlamaConfig(**config.to_hugging_face())
    theirs = transformers.LlamaForCausalLM(sizes).eval()
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 100, (2, 16))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    assert Config.load(str(tmp_path / "config.json")) == config
    found = logits(hugging_face.read(tmp_path, config), tokens, config=config)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@BOTH
def test_there_and_back(tmp_path: Path, config: Config) -> None:
    params = params_of(config)
    hugging_face.write(tmp_path, params, config)
    assert Config.load(str(tmp_path / "config.json")) == config
    back = hugging_face.read(tmp_path, config)
    jax.tree.map(np.testing.assert_array_equal, back, jax.device_get(params))


def test_grouped_queries_are_queries_of_repeated_keys() -> None:
    """Each head of keys and values, repeated for its group, gives the plain model."""
    params, tokens = params_of(GROUPED), np.arange(40).reshape(2, 20)
    repeated = jax.tree.map(lambda x: x, params)
    for name in ("k", "v"):
        kernel = params["layers"]["attn"][name]["kernel"]  # (L, D, G K)
        heads = kernel.reshape(*kernel.shape[:2], GROUPED.key_heads, -1)
        whole = jnp.repeat(heads, 3, axis=2).reshape(3, 48, 48)
        repeated["layers"]["attn"][name]["kernel"] = whole
    repeated["lm_head"] = {"kernel": params["embed"]["embedding"].T}
    plain = dataclasses.replace(GROUPED, key_heads=6, tied=False)
    found = logits(params, tokens, config=GROUPED)
    # Three layers of sums of some 48 terms in f32.
    expected = logits(repeated, tokens, config=plain)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=3 * 48 * 2**-24 * scale)


def test_future_tokens_do_not_matter() -> None:
    params, tokens = params_of(SMALL), np.arange(20).reshape(1, 20)
    changed = np.where(np.arange(20) < 12, tokens, 50)
    one, two = logits(params, tokens), logits(params, changed)
    np.testing.assert_array_equal(one[:, :12], two[:, :12])
    assert not np.allclose(one[:, 12:], two[:, 12:])


def test_rematerialisation_changes_no_gradient() -> None:
    params, tokens = params_of(SMALL), np.arange(24).reshape(2, 12)

    def gradient(numerics: Numerics) -> Any:
        return jax.grad(lambda p: logits(p, tokens, numerics).std())(params)

    plain, again = gradient(Numerics()), gradient(Numerics(remat=True))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(a).max()) + 1e-9)


def test_bfloat16_computes_what_float32_does() -> None:
    params, tokens = params_of(SMALL), np.arange(24).reshape(2, 12)
    low = logits(params, tokens, Numerics(compute="bfloat16"))
    assert low.dtype == jnp.bfloat16
    exact = logits(params, tokens)
    # Three layers of roundings of 2^-9 in products of 32 terms.
    assert np.abs(low - exact).mean() < 0.02 * np.std(exact)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Did you mean '130m'"):
        Config.load("130n")
    with pytest.raises(ValueError, match="hidden_size=30 must be a multiple"):
        Config(vocab=100, width=30, hidden=48, layers=3, heads=4, max_tokens=64)
    path = tmp_path / "config.json"
    for key, value, message in (
        ("num_key_value_heads", 3, "=4 must be a multiple of num_key_value_heads=3"),
        ("head_dim", 16, "head_dim=16, but this LLaMA has head_dim=8"),
        ("model_type", "qwen2", "model_type=qwen2, but"),
        ("rope_parameters", {"rope_type": "llama3"}, "rope_scaling=.*llama3"),
    ):
        path.write_text(json.dumps(SMALL.to_hugging_face() | {key: value}))
        with pytest.raises(ValueError, match=message):
            Config.load(str(path))
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors"):
        hugging_face.read(tmp_path, SMALL)
    tensors = hugging_face.to_tensors(params_of(SMALL), SMALL)
    missing = {k: v for k, v in tensors.items() if "layers.2.mlp.up" not in k}
    with pytest.raises(ValueError, match=r"'model.layers.2.mlp.up_proj.weight' is mis"):
        hugging_face.from_tensors(missing, SMALL)
    tensors["lm_head.weight"] = np.ones((7, 32))
    with pytest.raises(ValueError, match=r"'lm_head.weight' has shape \(7, 32\)"):
        hugging_face.from_tensors(tensors, SMALL)
