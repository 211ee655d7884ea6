# SPDX-License-Identifier: Apache-2.0
"""Docstrings become reStructuredText that renders, and nothing else changes."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def docstrings() -> ModuleType:
    pytest.importorskip("sphinx", reason="needs the extra docs")
    path = Path(__file__).resolve().parents[2] / "docs" / "_ext" / "docstrings.py"
    spec = importlib.util.spec_from_file_location("docstrings", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_in_the_plural(docstrings: ModuleType) -> None:
    assert docstrings.prepared(["of `Leaf`s, and `x`."]) == [r"of `Leaf`\ s, and `x`."]


def test_indented_blocks_keep_their_lines(docstrings: ModuleType) -> None:
    assert docstrings.prepared(["rows:", "", "    X = G"])[0] == "rows::"
    for lines in (["Args:", "  x: y"], ["rows:", "", "more"], [".. math::", "", "  x"]):
        assert docstrings.prepared(lines) == lines
