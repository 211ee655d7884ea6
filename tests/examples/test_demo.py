# SPDX-License-Identifier: Apache-2.0
"""The picture of the demo says what GaLore costs and what it saves."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import pytest
from matplotlib import pyplot as plt

import demo


def result(perplexity: float, state_bytes: int) -> Any:
    records = [{"step": step, "loss": 5.0} for step in range(1, 5)]
    records += [{"step": step, "validation_loss": 4.0} for step in (2, 4)]
    return SimpleNamespace(
        perplexity=perplexity, state_bytes=state_bytes, records=records
    )


def test_its_picture_shows_perplexities_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib.use("Agg")
    drawn: list[Any] = []
    monkeypatch.setattr(plt, "close", drawn.append)
    results = {
        "AdamW": result(109.9, 33_700_000),
        "GaLore, rank 64": result(115.8, 16_600_000),
    }
    demo.picture(results, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").stat().st_size > 1000
    losses, sizes = drawn[0].axes
    assert [text.get_text() for text in losses.texts] == [
        "AdamW\nperplexity 109.9",
        "GaLore, rank 64\nperplexity 115.8",
    ]
    assert [bar.get_height() for bar in sizes.patches] == [33.7, 16.6]
    told = [text.get_text() for text in sizes.texts]
    assert told == ["33.7 MB\n100%", "16.6 MB\n49%"]
