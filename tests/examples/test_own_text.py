# SPDX-License-Identifier: Apache-2.0
"""Text of one's own: what is read, what is refused, and with which remedy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.examples.conftest import sentences
from tests.examples.helpers import tiny

import data
import own_text
from settings import Settings
from train import Trainer

SIZE = own_text.Size(vocab=300, tokens=32, batch=4)


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GALORE_OPTAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "notes"
    (folder / "old").mkdir(parents=True)
    for seed, name in enumerate(("a.txt", "old/b.txt", "c.md")):
        (folder / name).write_text("\n\n".join(sentences(60, seed)))
    return folder


def test_a_pattern_names_files(notes: Path) -> None:
    def names(pattern: str) -> list[str]:
        return [path.name for path in own_text.paths(str(notes / pattern))]

    assert names("a.txt") == ["a.txt"]
    assert names("*.txt") == ["a.txt"]
    assert names("**/*.txt") == ["a.txt", "b.txt"]
    assert names("**/*") == ["a.txt", "c.md", "b.txt"]


def test_pieces_are_the_text(notes: Path, tmp_path: Path) -> None:
    found = list(own_text.pieces(notes / "a.txt"))
    assert "".join(found) == (notes / "a.txt").read_text()
    assert len(found) > 1
    assert all(piece.endswith("\n") for piece in found[:-1])
    line = tmp_path / "line.txt"
    line.write_bytes(b"\xef\xbb\xbf" + b"ab " * 5000 + b"\r\nend\r\n")
    found = list(own_text.pieces(line))
    assert max(map(len, found)) == own_text.PIECE
    assert "".join(found) == "ab " * 5000 + "\nend\n"


def test_tokens_are_those_of_the_files(notes: Path) -> None:
    corpus = own_text.load(str(notes / "**/*.txt"), SIZE)
    texts = [t for x in ("a.txt", "old/b.txt") for t in own_text.pieces(notes / x)]
    decoded = [
        text
        for part in (corpus.train, corpus.validation)
        for text in corpus.tokenizer.decode(part, skip_special_tokens=False).split(
            data.END
        )
        if text
    ]
    assert sorted(decoded) == sorted(texts)
    assert len(corpus.validation) > SIZE.tokens


def test_prepared_once_for_each_content(
    notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = own_text.load(str(notes / "a.txt"), SIZE)
    monkeypatch.setattr(data, "_prepare", lambda *_: pytest.fail("prepared again"))
    again = own_text.load(str(notes / "a.txt"), SIZE)
    np.testing.assert_array_equal(again.train, first.train)
    (notes / "a.txt").write_text("other " * 2000)
    with pytest.raises(pytest.fail.Exception, match="prepared again"):
        own_text.load(str(notes / "a.txt"), SIZE)


def test_a_tokenizer_of_ones_own(notes: Path, files: Path) -> None:
    tokenizer = files / "tokenizer.json"
    corpus = own_text.load(str(notes / "a.txt"), SIZE, tokenizer)
    assert (
        corpus.tokenizer.to_str() == data.Tokenizer.from_file(str(tokenizer)).to_str()
    )
    with pytest.raises(ValueError, match=r"made token \d+ of .*room for 100"):
        own_text.load(str(notes / "a.txt"), SIZE._replace(vocab=100), tokenizer)


def test_many_tokens_take_more_bits() -> None:
    tokenizer = data.train_tokenizer(["low rank"], 300)
    tokenizer.add_tokens([f"<{i}>" for i in range(2**16)])
    found = data.encode(tokenizer, [f"<{2**16 - 1}>"])
    assert found.dtype == np.uint32
    last = tokenizer.token_to_id(f"<{2**16 - 1}>")
    assert list(found) == [last, tokenizer.token_to_id(data.END)]


def test_what_is_not_there(notes: Path) -> None:
    for pattern in ("d.txt", "*.tex", "none/**/*"):
        with pytest.raises(FileNotFoundError, match=r"no such file in .*in quotes"):
            Settings(text=str(notes / pattern))
    with pytest.raises(IsADirectoryError, match=r"is a folder.*notes/\*\*/\*\.txt"):
        Settings(text=str(notes))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Größe ".encode("latin1"), r"mixed\.txt is no text in UTF-8: byte 2 is 0xf6"),
        ("text".encode("utf-16-le"), r"mixed\.txt holds null bytes.*UTF-8"),
    ],
)
def test_unreadable_text_is_named(notes: Path, content: bytes, message: str) -> None:
    (notes / "mixed.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        own_text.load(str(notes / "*.txt"), SIZE)


def test_too_little_text(notes: Path) -> None:
    short = notes / "short.txt"
    for content in ("", "\n\n", "a few words"):
        short.write_text(content)
        with pytest.raises(ValueError, match=r"characters, of which nothing can be"):
            own_text.load(str(short), SIZE)
    wanted: Any = SIZE._replace(batch=4000)
    with pytest.raises(
        ValueError, match=r"too short: it has .* need 128,001 and 33\. Give more text"
    ):
        own_text.load(str(notes / "a.txt"), wanted)


@pytest.mark.slow
def test_a_run_reads_it(notes: Path, files: Path, tmp_path: Path) -> None:
    run = tiny(
        files, tmp_path / "run", text=str(notes / "*.txt"), steps=4, eval_every=4
    )
    result = Trainer(run).train()
    assert result.perplexity > 1
    assert len(list((tmp_path / "cache").glob("text-*-300"))) == 1
