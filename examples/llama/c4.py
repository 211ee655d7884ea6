# SPDX-License-Identifier: Apache-2.0
"""C4, streamed and tokenised on the way, as in the paper.

The reference cuts and pads every document to 256 tokens (`pack=False`); packing reads
the same documents without waste. Unlike the reference's shuffle buffer, whose contents
cannot be restored, the order is that of the files: C4 is shuffled already.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from data import PAD

DATASET = "allenai/c4"
TOKENIZER = "t5-base"


def tokenizer(name_or_path: str = TOKENIZER) -> Tokenizer:
    """A `tokenizer.json`, or the name of a tokenizer on the Hugging Face hub."""
    if Path(name_or_path).is_file():
        return Tokenizer.from_file(name_or_path)
    return Tokenizer.from_pretrained(name_or_path)


def documents(split: str, files: str | None = None) -> Any:
    """C4's English documents as a `datasets.IterableDataset`.

    Args:
      split: "train" or "validation".
      files: a folder with local copies, `c4-train.00000-of-01024.json.gz` and so on;
        `None` streams from the hub.

    Raises:
      FileNotFoundError: the folder holds no such file.
    """
    import datasets

    if files is None:
        return datasets.load_dataset(DATASET, "en", split=split, streaming=True)
    paths = sorted(str(path) for path in Path(files).glob(f"c4-{split}.*"))
    if not paths:
        raise FileNotFoundError(
            f"{files} has no file c4-{split}.*; C4's files are named"
            f" c4-{split}.00000-of-....json.gz."
        )
    return datasets.load_dataset(
        "json", data_files=paths, split="train", streaming=True
    )


class Documents:
    """Endless batches of tokenised documents."""

    def __init__(
        self,
        source: Any,
        tokenizer: Tokenizer,
        vocab: int,
        tokens: int,
        batch: int,
        pack: bool,
    ):
        self._source, self._tokenizer, self._vocab = source, tokenizer, vocab
        self._tokens, self._batch, self._pack = tokens, batch, pack
        self._end = tokenizer.token_to_id("</s>")
        self._rest: list[int] = []  # packed: what the last window left over
        self._start = source.state_dict()
        self._documents = iter(source)

    def __next__(self) -> np.ndarray:
        return np.stack(list(itertools.islice(self._windows(), self._batch)))

    def state(self) -> dict[str, Any]:
        return {
            "rest": list(self._rest),
            "source": self._source.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._rest = list(state["rest"])
        self._begin(state["source"])

    def _begin(self, position: dict[str, Any]) -> None:
        self._source.load_state_dict(position)
        self._documents = iter(self._source)

    def _windows(self) -> Iterator[np.ndarray]:
        while True:
            yield self._packed() if self._pack else self._padded()

    def _padded(self) -> np.ndarray:
        window = np.full(self._tokens + 1, PAD, np.int32)
        ids = self._ids()[: self._tokens + 1]
        window[: len(ids)] = ids
        return window

    def _packed(self) -> np.ndarray:
        while len(self._rest) <= self._tokens:
            self._rest += self._ids()
        window = np.array(self._rest[: self._tokens + 1], np.int32)
        self._rest = self._rest[self._tokens :]
        return window

    def _ids(self) -> list[int]:
        ids = self._tokenizer.encode(self._next_text()).ids
        # Not the tokenizer's size: T5's has 100 more than the models, never in text.
        if max(ids, default=0) >= self._vocab:
            raise ValueError(
                f"the tokenizer made token {max(ids)}, but the model has room for"
                f" {self._vocab}. Take a config.json with a larger vocab_size."
            )
        ends = self._end is None or ids[-1:] == [self._end]
        return ids if ends else [*ids, self._end]

    def _next_text(self) -> str:
        for document in self._documents:
            return document["text"]
        self._begin(self._start)  # the next epoch
        return next(self._documents)["text"]
