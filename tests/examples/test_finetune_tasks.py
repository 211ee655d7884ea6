# SPDX-License-Identifier: Apache-2.0
"""Rows of the fine-tuning tasks, their scores, and the batches made of them."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import batches
import tasks
from batches import NO_LABEL, Encoded
from data import train_tokenizer

COLA = 'gj04\t1\t\tThe "car honked.\ngj04\t0\t*\tCar the honked "down.\n'
RTE = "3\tIt rains.\tIt is wet.\tentailment\n4\tIt rains.\tNo.\tnot_entailment"
RTE_HEADER = "index\tsentence1\tsentence2\tlabel\n"
SST2 = "sentence\tlabel\na charming journey \t1\nbleak \t0\n"

bits = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2)


@given(bits)
def test_matthews_is_the_correlation_of_two_binary_variables(pairs: list) -> None:
    labels, found = np.array(pairs).T
    assume(len(set(labels)) == len(set(found)) == 2)
    expected = np.corrcoef(labels, found)[0, 1]
    assert tasks.matthews(labels, found) == pytest.approx(expected, abs=1e-12)


def test_scores_at_their_limits() -> None:
    labels = np.array([0, 1, 1, 0])
    assert tasks.matthews(labels, labels) == 1
    assert tasks.matthews(labels, 1 - labels) == -1
    assert tasks.matthews(labels, np.ones(4, int)) == 0
    assert tasks.accuracy(labels, np.array([0, 1, 0, 0])) == 0.75


def folder(path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return path


def test_quotes_headers_and_pairs_are_read_as_they_are(tmp_path: Path) -> None:
    files = {f"CoLA/{x}.tsv": COLA for x in ("train", "val", "dev")}
    files |= {"RTE/train.tsv": RTE_HEADER + RTE, "RTE/val.tsv": RTE}
    glue = folder(tmp_path, files | {"RTE/dev.tsv": RTE_HEADER + RTE})
    for part in tasks.load("cola", glue):
        assert part.texts == [('The "car honked.',), ('Car the honked "down.',)]
        assert list(part.labels) == [1, 0]
    for part in tasks.load("rte", glue):
        assert part.texts == [("It rains.", "It is wet."), ("It rains.", "No.")]
        assert list(part.labels) == [0, 1]


def many(count: int, start: int) -> str:
    return "sentence\tlabel\n" + "".join(f"text {start + i}\t1\n" for i in range(count))


def test_which_file_is_which_part(tmp_path: Path) -> None:
    published = {"train": many(200, 0), "dev": many(5, 500)}
    published["test"] = "index\tsentence\n0\tunlabelled\n"
    glue = folder(tmp_path, {f"SST-2/{k}.tsv": v for k, v in published.items()})
    train, validation, dev = tasks.load("sst2", glue)
    assert len(dev.labels) == 5
    assert 5 < len(validation.labels) < 40  # a tenth of 200
    assert sorted(train.texts + validation.texts) == sorted(
        (f"text {i}",) for i in range(200)
    )
    folder(glue, {"SST-2/test.tsv": many(7, 600)})  # labelled: it is the dev set
    train, validation, dev = tasks.load("sst2", glue)
    assert [len(part.labels) for part in (train, validation, dev)] == [200, 5, 7]
    folder(glue, {"SST-2/val.tsv": many(9, 700)})
    train, validation, dev = tasks.load("sst2", glue)
    assert [len(part.labels) for part in (train, validation, dev)] == [200, 9, 5]


def test_the_split_by_hash_follows_the_text(tmp_path: Path) -> None:
    files = {"SST-2/train.tsv": many(200, 0), "SST-2/dev.tsv": SST2}
    first = tasks.load("sst2", folder(tmp_path, files)).validation.texts
    more = many(200, 0) + "text 3\t0\nanother\t1\n"
    files["SST-2/train.tsv"] = more
    second = tasks.load("sst2", folder(tmp_path, files)).validation.texts
    assert set(first) <= set(second) <= {*first, ("another",)}


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown task 'mnli'; known: cola, rte, sst2"):
        tasks.load("mnli")
    with pytest.raises(ValueError, match=r"'cola' .* holds CoLA/train\.tsv and dev"):
        tasks.load("cola")
    with pytest.raises(FileNotFoundError, match=r"CoLA/train\.tsv is missing"):
        tasks.load("cola", tmp_path)
    folder(tmp_path, {"CoLA/train.tsv": COLA + "gj04\t1\n"})
    with pytest.raises(
        ValueError, match=r"train\.tsv, line 3 has 2 columns, expected 4"
    ):
        tasks.load("cola", tmp_path)
    folder(tmp_path, {"CoLA/train.tsv": COLA + "gj04\tyes\t\tText\n"})
    with pytest.raises(ValueError, match=r"labels \['yes'\], expected 0, 1"):
        tasks.load("cola", tmp_path)


# Rows of the parts together, and of GLUE's development set.
PUBLISHED = {"cola": (8551, 1043), "rte": (2490, 277), "sst2": (67349, 872)}


@pytest.mark.skipif("GLUE_DIR" not in os.environ, reason="GLUE_DIR names no folder")
@pytest.mark.parametrize("name", PUBLISHED)
def test_glue_has_the_published_numbers_of_rows(name: str) -> None:
    train, validation, dev = tasks.load(name, Path(os.environ["GLUE_DIR"]))
    training = len(train.labels) + len(validation.labels)
    assert (training, len(dev.labels)) == PUBLISHED[name]
    assert not set(dev.texts) & set(train.texts) or name != "rte"


@pytest.mark.slow
def test_film_reviews_are_split_without_overlap() -> None:
    try:
        parts = tasks.load("reviews")
    except RuntimeError as error:
        pytest.skip(str(error))
    sets = [set(part.texts) for part in parts]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 8530
    assert [round(len(part) / 853) for part in sets] == [8, 1, 1]
    assert sum(int(part.labels.sum()) for part in parts) == 4265


def rows(lengths: list[int]) -> Encoded:
    """Row n consists of the token n, as often as it is long."""
    tokens = [[number] * length for number, length in enumerate(lengths)]
    types = [[number % 2] * length for number, length in enumerate(lengths)]
    return Encoded(tokens, types, np.arange(len(lengths), dtype=np.int32))


def check(batch: batches.Batch, given: Encoded) -> list[int]:
    """The rows of a batch, which it holds as they are."""
    found = [int(label) for label in batch.labels if label != NO_LABEL]
    assert batch.inputs.tokens.shape[1] in batches.BUCKETS
    for at, number in enumerate(found):
        length = batch.inputs.lengths[at]
        assert list(batch.inputs.tokens[at, :length]) == given.tokens[number]
        assert list(batch.inputs.types[at, :length]) == given.types[number]
        assert not batch.inputs.tokens[at, length:].any()
    return found


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=4, max_size=300), st.integers(1, 4))
def test_batches_hold_every_row_once(lengths: list[int], batch: int) -> None:
    given = rows(lengths)
    seen = [
        number
        for part in batches.epoch(given, batch, np.random.default_rng(0))
        for number in check(part, given)
    ]
    assert len(seen) == len(set(seen)) == len(lengths) // batch * batch
    everything = [
        number
        for part in batches.in_order(given, batch)
        for number in check(part, given)
    ]
    assert sorted(everything) == list(range(len(lengths)))


def test_an_epoch_is_shuffled_and_pads_little() -> None:
    lengths = np.random.default_rng(0).integers(1, 128, 4000)
    given, rng = rows(list(map(int, lengths))), np.random.default_rng(0)
    first, second = (list(batches.epoch(given, 16, rng)) for _ in range(2))
    assert [list(b.labels) for b in first] != [list(b.labels) for b in second]
    padded = sum(batch.inputs.tokens.size for batch in first)
    # Inside a pool lengths rise evenly, so a batch spans 128 / 32 = 4 of them; what a
    # bucket adds is at most half of the 16 between buckets on average.
    assert padded < 16 * len(first) * (lengths.mean() + 4 + 8)
    widths = [batch.inputs.tokens.shape[1] for batch in first]
    assert widths != sorted(widths)


def test_too_few_rows_are_said() -> None:
    with pytest.raises(ValueError, match="batch=4 is more than the 3 rows"):
        next(batches.epoch(rows([1, 2, 3]), 4, np.random.default_rng(0)))


def test_long_rows_are_cut_and_pairs_told_apart() -> None:
    tokenizer = train_tokenizer(["low rank gradient " * 9], 300)
    given = tasks.Rows([("low rank " * 9, "gradient")], np.zeros(1, np.int32))
    found = batches.encode(tokenizer, given, 8)
    assert len(found.tokens[0]) == 8
    assert found.types[0] == sorted(found.types[0])
    assert found.types[0][-1] == 1
