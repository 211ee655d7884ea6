# SPDX-License-Identifier: Apache-2.0
"""What README and docs show runs as it stands there."""

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOCUMENTS = [
    path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if path.exists() and BLOCK.search(path.read_text())
]


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_code_runs(path: Path) -> None:
    names: dict[str, object] = {}
    for code in BLOCK.findall(path.read_text()):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(compile(code, path.name, "exec"), names)
