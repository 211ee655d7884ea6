# SPDX-License-Identifier: Apache-2.0
"""Text files of one's own as a corpus.

files -> pieces of whole lines -> training / held out -> tokens, cached
"""

import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

import data

PIECE = 4000  # characters, of which some pieces are held out


class Size(NamedTuple):
    """What a run needs of its text."""

    vocab: int  # of the model
    tokens: int  # a sequence
    batch: int


def check(pattern: str) -> None:
    """Refuses a pattern that names no file; none is asked for by an empty one.

    Raises:
      OSError: as `paths`.
    """
    if pattern:
        paths(pattern)


def paths(pattern: str) -> list[Path]:
    """The files that `pattern` names, in order.

    Raises:
      FileNotFoundError: there is none.
      IsADirectoryError: it is a folder.
    """
    expanded = Path(pattern).expanduser()
    if expanded.is_dir():
        raise IsADirectoryError(
            f"text={pattern!r} is a folder. Name its files: '{expanded}/**/*.txt'."
        )
    found = sorted(map(Path, glob.glob(str(expanded), recursive=True)))
    files = [path for path in found if path.is_file()]
    if not files:
        raise FileNotFoundError(
            f"text={pattern!r}: there is no such file in {Path.cwd()}. Give the path of"
            " a text file, or a pattern in quotes, such as 'notes/**/*.txt'."
        )
    return files


def pieces(file: Path) -> Iterator[str]:
    """Its text in pieces of whole lines, longer lines cut.

    Raises:
      ValueError: it is no text in UTF-8.
    """
    piece = ""
    for line in _text(file).splitlines(keepends=True):
        if piece and len(piece) + len(line) > PIECE:
            yield piece
            piece = ""
        piece += line
        while len(piece) > PIECE:
            yield piece[:PIECE]
            piece = piece[PIECE:]
    if piece.strip():
        yield piece


def _text(file: Path) -> str:
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is no text in UTF-8: byte {error.start} is"
            f" 0x{content[error.start]:02x}. Convert it, such as by iconv -f latin1 -t"
            " utf-8, or leave it out of the pattern."
        ) from error
    if "\0" in text:
        raise ValueError(
            f"{file} holds null bytes, as binary files and UTF-16 do. Save it as text"
            " in UTF-8, or leave it out of the pattern."
        )
    return text.replace("\r\n", "\n")


def load(pattern: str, size: Size, tokenizer: Path | None = None) -> data.Corpus:
    """The corpus of these files, prepared once for each content of theirs.

    Args:
      pattern: a file or a glob.
      size: what has to come out.
      tokenizer: a `tokenizer.json`; `None` trains a BPE of `size.vocab` entries.

    Raises:
      OSError: as `paths`.
      ValueError: a file is no text, there is too little of it, or a token is none of
        the model's.
    """
    files = paths(pattern)
    corpus = data.prepared(
        data.cache_dir() / f"text-{_digest(files, tokenizer)}-{size.vocab}",
        lambda: _all_pieces(pattern, files),
        lambda texts: _tokenizer(texts, size.vocab, tokenizer),
    )
    _check(pattern, corpus, size)
    return corpus


def _digest(files: list[Path], tokenizer: Path | None) -> str:
    digest = hashlib.sha256()
    for file in [*files, *([tokenizer] if tokenizer else [])]:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def _all_pieces(pattern: str, files: list[Path]) -> list[str]:
    found = [piece for file in files for piece in pieces(file)]
    if len(found) < 2:
        length = sum(map(len, found))
        raise ValueError(
            f"text={pattern!r} has {length:,} characters, of which nothing can be held"
            f" out: a piece is {PIECE:,}. Give more text, or a packaged corpus."
        )
    return found


def _tokenizer(texts: list[str], vocab: int, file: Path | None) -> Tokenizer:
    if file is None:
        return data.new_tokenizer(texts, vocab)
    return Tokenizer.from_file(str(file))


def _check(pattern: str, corpus: data.Corpus, size: Size) -> None:
    largest = max(int(np.max(x)) for x in (corpus.train, corpus.validation))
    if largest >= size.vocab:
        raise ValueError(
            f"the tokenizer made token {largest} of text={pattern!r}, but the model has"
            f" room for {size.vocab}. Take the model's own tokenizer, or a config.json"
            " with a larger vocab_size."
        )
    found = len(corpus.train), len(corpus.validation)
    needed = size.batch * size.tokens + 1, size.tokens + 1
    if found[0] < needed[0] or found[1] < needed[1]:
        raise ValueError(
            f"text={pattern!r} is too short: it has {found[0]:,} tokens to train on and"
            f" {found[1]:,} held out, and batch={size.batch}, tokens={size.tokens} need"
            f" {needed[0]:,} and {needed[1]:,}. Give more text, a smaller batch or"
            " shorter sequences."
        )
