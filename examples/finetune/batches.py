# SPDX-License-Identifier: Apache-2.0
"""Texts to batches of a few shapes: rows of like length together, padded to a bucket.

texts -> WordPiece -> rows -> shuffled, sorted inside pools -> (B, T), T a bucket
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from encoder import Inputs
from tasks import Rows

# XLA compiles a step for each. Close together, since padding costs what tokens cost.
BUCKETS = (8, 12, 16, 20, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 192, 256, 384, 512)
POOL = 32  # batches whose rows are sorted by length
NO_LABEL = -1  # of the rows that fill up a batch


class Batch(NamedTuple):
    inputs: Inputs
    labels: np.ndarray  # int32 (B,)


class Encoded(NamedTuple):
    """Rows as numbers."""

    tokens: list[list[int]]
    types: list[list[int]]
    labels: np.ndarray  # int32 (N,)

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.tokens])


def encode(tokenizer: Tokenizer, rows: Rows, tokens: int) -> Encoded:
    """Rows of at most `tokens` tokens; of a pair the longer text is cut first."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(tokens, strategy="longest_first")
    texts = [text if len(text) > 1 else text[0] for text in rows.texts]
    found = tokenizer.encode_batch(texts)
    return Encoded([x.ids for x in found], [x.type_ids for x in found], rows.labels)


def epoch(rows: Encoded, batch: int, rng: np.random.Generator) -> Iterator[Batch]:
    """Full batches in a random order, every row at most once; what is over is left.

    Raises:
      ValueError: there are fewer rows than one batch.
    """
    count = len(rows.labels) // batch
    if not count:
        raise ValueError(f"batch={batch} is more than the {len(rows.labels)} rows.")
    order, lengths = rng.permutation(len(rows.labels))[: count * batch], rows.lengths
    pools = np.split(order, range(POOL * batch, len(order), POOL * batch))
    ordered = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools])
    for chosen in rng.permutation(ordered.reshape(count, batch)):
        yield collate(rows, chosen, batch)


def in_order(rows: Encoded, batch: int) -> Iterator[Batch]:
    """All rows, the shortest first, the last batch filled up."""
    order = np.argsort(rows.lengths, kind="stable")
    for start in range(0, len(order), batch):
        yield collate(rows, order[start : start + batch], batch)


def collate(rows: Encoded, chosen: np.ndarray, batch: int) -> Batch:
    """Some rows, padded to the least bucket that holds them, and to `batch` rows."""
    lengths = np.ones(batch, np.int32)
    lengths[: len(chosen)] = rows.lengths[chosen]
    width = next(size for size in BUCKETS if size >= lengths.max())
    tokens, types = np.zeros((2, batch, width), np.int32)
    labels = np.full(batch, NO_LABEL, np.int32)
    for at, row in enumerate(chosen):
        tokens[at, : lengths[at]] = rows.tokens[row]
        types[at, : lengths[at]] = rows.types[row]
    labels[: len(chosen)] = rows.labels[chosen]
    return Batch(Inputs(tokens, types, lengths), labels)
