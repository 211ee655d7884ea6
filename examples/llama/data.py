# SPDX-License-Identifier: Apache-2.0
"""Token batches with a position: packaged prose from a memory map, C4 as a stream.

    documents -> BPE -> uint16 file, mapped -> windows of T + 1 -> shuffled batches
    C4 JSON lines -> tokenizer -> packed, or cut and padded to T + 1 -> batches

A batch is int32 (B, T + 1); `PAD` marks what is neither read nor predicted. The order
depends on the seed alone, and `state()` says where in it a stream stands.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import corpora

END = "<|end|>"  # after every document
# That of ours, and what others call theirs.
ENDS = (END, "</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")
PAD = -1
_SUMS = "sha256.json"  # written last: its presence says that all is there


class Stream(Protocol):
    """Endless batches, (B, T + 1)."""

    def __next__(self) -> np.ndarray: ...

    def state(self) -> dict[str, Any]:
        """Where the next batch begins, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


def cache_dir() -> Path:
    """`$GALORE_OPTAX_CACHE`, or `~/.cache/galore_optax`."""
    default = Path.home() / ".cache" / "galore_optax"
    return Path(os.environ.get("GALORE_OPTAX_CACHE", default))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token arrays, uint16 or uint32, documents joined by an end token."""

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer

    def batches(self, tokens: int, batch: int, seed: int) -> "Shuffled":
        """Endless training batches, every window once an epoch."""
        return Shuffled(Windows(self.train, tokens), batch, seed)

    def validation_batches(
        self, tokens: int, batch: int, count: int | None = None
    ) -> Iterator[np.ndarray]:
        """All windows in order, the last batch padded; or `count`, evenly spread."""
        windows = Windows(self.validation, tokens)
        chosen = np.arange(len(windows))
        if count is not None and count * batch < len(windows):
            chosen = np.linspace(0, len(windows) - 1, count * batch).astype(int)
        for start in range(0, len(chosen), batch):
            rows = [windows[i] for i in chosen[start : start + batch]]
            yield np.stack(rows + [np.full(tokens + 1, PAD)] * (batch - len(rows)))


class Windows:
    """Windows of T + 1 tokens that overlap in one, so that each is predicted once."""

    def __init__(self, stream: np.ndarray, tokens: int):
        self.stream, self.tokens = stream, tokens
        if len(self) < 1:
            raise ValueError(
                f"{len(stream)} tokens hold no window of {tokens + 1}. Take a shorter"
                " sequence or more text."
            )

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.tokens

    def __getitem__(self, number: Any) -> np.ndarray:
        start = int(number) * self.tokens
        return self.stream[start : start + self.tokens + 1].astype(np.int32)


class Shuffled:
    """Windows in a random order, another each epoch."""

    def __init__(self, windows: Windows, batch: int, seed: int):
        if batch > len(windows):
            raise ValueError(
                f"batch={batch} is more than the {len(windows)} windows there are."
            )
        order = grain.MapDataset.source(windows).seed(seed).shuffle().repeat()
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
        batches = order.batch(batch, drop_remainder=True)
        self._iterator = iter(batches.to_iter_dataset(options))

    def __next__(self) -> np.ndarray:
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        return self._iterator.get_state()

    def restore(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)


def load(corpus: str, vocab: int) -> Corpus:
    """A packaged corpus with its own BPE of `vocab` entries; prepared once, cached.

    Raises:
      ValueError: the cached files are not those that were written.
    """
    pinned = hashlib.sha256(json.dumps(corpora.pins()).encode()).hexdigest()[:12]

    def texts() -> list[str]:
        return list(corpora.documents(corpus, cache_dir() / "archives"))

    folder = cache_dir() / f"{corpus}-{pinned}-{vocab}"
    return prepared(folder, texts, lambda train: new_tokenizer(train, vocab))


def prepared(
    folder: Path,
    texts: Callable[[], list[str]],
    tokenizer: Callable[[list[str]], Tokenizer],
) -> Corpus:
    """The corpus in `folder`, made there if it is new.

    Args:
      folder: named after everything that the corpus is made of.
      texts: its documents.
      tokenizer: of those to train on.

    Raises:
      ValueError: the files are not those that were written.
    """
    if not (folder / _SUMS).exists():
        _prepare(folder, texts(), tokenizer)
    for name, expected in json.loads((folder / _SUMS).read_text()).items():
        found = _sha256(folder / name) if (folder / name).exists() else "no file"
        if found != expected:
            raise ValueError(
                f"{folder / name} is missing, truncated or altered: SHA-256 {found},"
                f" expected {expected}. Delete {folder} and run again."
            )
    return Corpus(
        np.load(folder / "train.npy", mmap_mode="r"),
        np.load(folder / "validation.npy", mmap_mode="r"),
        Tokenizer.from_file(str(folder / "tokenizer.json")),
    )


def _prepare(
    folder: Path, texts: list[str], tokenizer_of: Callable[[list[str]], Tokenizer]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = corpora.split(texts)
    tokenizer = tokenizer_of(train)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, part in (("train", train), ("validation", validation)):
        np.save(folder / f"{name}.npy", encode(tokenizer, part))
    sums = {path.name: _sha256(path) for path in folder.iterdir()}
    partial = folder / "partial"
    partial.write_text(json.dumps(sums))
    partial.rename(folder / _SUMS)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def new_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """As `train_tokenizer`, which takes a while."""
    print(f"training a byte-level BPE of {vocab} entries on {len(texts)} documents")
    return train_tokenizer(texts, vocab)


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


def end_tokens(tokenizer: Tokenizer) -> list[str]:
    """Those of `ENDS` that a tokenizer knows."""
    return [end for end in ENDS if tokenizer.token_to_id(end) is not None]


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All tokens, in 16 bits if that is enough, each text followed by its end."""
    ends = [tokenizer.token_to_id(end) for end in end_tokens(tokenizer)][:1]
    encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
    wide = tokenizer.get_vocab_size() > 2**16
    joined = np.concatenate([[*item.ids, *ends] for item in encoded])
    return joined.astype(np.uint32 if wide else np.uint16)
