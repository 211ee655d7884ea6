# SPDX-License-Identifier: Apache-2.0
"""The notebook: what it shows is what its cells print today."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "quickstart.ipynb"
MOST = 100_000  # bytes, its picture included
FEW = 15  # steps of training, after which the loss has fallen by a quarter


def cells() -> list[dict[str, Any]]:
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def run(cell: dict[str, Any], names: dict[str, Any]) -> None:
    code = re.sub(r"STEPS = (.*), \d+", rf"STEPS = \1, {FEW}", "".join(cell["source"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(code, NOTEBOOK.name, "exec"), names)


def printed(cell: dict[str, Any]) -> str:
    return "".join(line for out in cell["outputs"] for line in out.get("text", ()))


def test_it_is_stored_as_it_ran() -> None:
    text = NOTEBOOK.read_text()
    assert len(text.encode()) < MOST
    assert not re.search(r"/(home|root|tmp|usr|work|Users)/|site-packages", text)
    counts = [cell["execution_count"] for cell in cells()]
    assert counts == list(range(1, len(counts) + 1))
    kinds = {out["output_type"] for cell in cells() for out in cell["outputs"]}
    assert kinds == {"stream", "display_data"}  # and no error


def test_its_report_is_what_describe_prints(capsys: pytest.CaptureFixture[str]) -> None:
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    for cell in cells()[:3]:
        capsys.readouterr()
        run(cell, names)
    assert capsys.readouterr().out == printed(cells()[2])


@pytest.mark.slow
def test_it_runs_and_learns() -> None:
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    for cell in cells():
        run(cell, names)
    assert set(names["runs"]) == {"AdamW", "GaLore"}
    for losses, held_out in names["runs"].values():
        assert len(losses) == FEW
        assert held_out < 0.75 * losses[0]
