# SPDX-License-Identifier: Apache-2.0
"""A tiny model in processes of one device each: the same run, and a death."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.examples.helpers import LLAMA, tiny

import launch
import metrics
import processes
from settings import Settings
from train import Trainer

pytestmark = pytest.mark.slow

# Plain steps in the subspace: the update depends on the span of a basis alone.
RUN: dict[str, Any] = {
    "steps": 24,
    "optimizer": "galore_sgd",
    "options": ("rank=4", "update_proj_gap=10", "subspace=svd"),
    "learning_rate": 0.1,
    "checkpoint_every": 4,
    "eval_every": 24,
    "mesh": ("fsdp=2",),
}
# A loss is a mean over 4 · 32 tokens, summed in another order.
ROUNDING = 4 * 32 * 6e-8


def words(run: Settings) -> list[str]:
    """The arguments of a run; those of lists last."""
    names = ("model", "corpus", "c4_files", "tokenizer", "optimizer", "steps", "batch")
    names += ("tokens", "learning_rate", "checkpoint_every", "log_every", "out")
    names += ("eval_every", "eval_batches")
    found = []
    for name in names:
        found += [f"--{name.replace('_', '-')}", str(getattr(run, name))]
    return [*found, "--options", *run.options, "--mesh", *run.mesh]


def environment() -> dict[str, str]:
    return launch.environment(1) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, text=True
    )


def losses(records: list[metrics.Record]) -> list[float]:
    return metrics.series(records, "loss")[1]


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """What one process finds, on a mesh of as many devices."""
    run = tiny(files, tmp_path_factory.mktemp("whole"), **RUN)
    return losses(Trainer(run).train().records)


@pytest.mark.parametrize(
    ("count", "mesh"), [(2, ("fsdp=2",)), (4, ("data=2", "fsdp=2"))]
)
def test_several_processes_are_one(
    files: Path, tmp_path: Path, whole: list[float], count: int, mesh: tuple[str, ...]
) -> None:
    run = tiny(files, tmp_path, **RUN | {"mesh": mesh})
    command = [sys.executable, str(LLAMA / "launch.py"), "-n", str(count), "--"]
    subprocess.run([*command, *words(run)], env=environment(), check=True)
    records = metrics.read(tmp_path / "metrics.jsonl")
    assert metrics.series(records, "loss")[0] == list(range(1, 25))  # written once
    np.testing.assert_allclose(losses(records), whole, rtol=ROUNDING)
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_one_dies_and_one_goes_on_alone(
    files: Path, tmp_path: Path, whole: list[float]
) -> None:
    run = tiny(files, tmp_path, **RUN)
    left, killed = (start(c) for c in launch.commands(2, words(run)))
    while killed.poll() is None and left.poll() is None:
        records = metrics.read(tmp_path / "metrics.jsonl")
        if records and records[-1]["step"] >= 9:
            killed.kill()
            killed.communicate()
    _, said = left.communicate(timeout=processes.NOTICED)
    assert left.returncode != 0
    assert "process 0 of 2 ended before the run did" in said
    assert f"Whole checkpoints in {tmp_path / 'checkpoints'}: 4" in said
    alone = Trainer(tiny(files, tmp_path, **RUN | {"mesh": ()}))
    assert alone.first in (4, 8)
    np.testing.assert_allclose(losses(alone.train().records), whole, rtol=ROUNDING)


def test_processes_with_other_settings_are_refused(files: Path, tmp_path: Path) -> None:
    run = tiny(files, tmp_path, **RUN)
    one, two = launch.commands(2, words(run))
    both = start(one), start([*two, "--seed", "3", "--clip", "2"])
    for process in both:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "process 0 clip is 1.0, seed is 0, in process 1 clip is 2.0, se" in said
    assert not (tmp_path / "metrics.jsonl").exists()
