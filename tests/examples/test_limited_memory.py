# SPDX-License-Identifier: Apache-2.0
"""The benchmark of training in limited memory, at a size that any machine holds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_every_row_runs_and_nothing_is_recorded_without_a_device(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "benchmarks.memory.limited_memory"]
    command += ["--model", "9m", "--steps", "2", "--out", tmp_path]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'fits': True") == 4
    assert "nothing is recorded" in done.stdout
