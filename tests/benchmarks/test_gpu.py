# SPDX-License-Identifier: Apache-2.0
"""The measurements for a GPU, at tiny size on a CPU."""

import json
import subprocess
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.lib import records, shapes, subjects
from benchmarks.lib.shapes import Shapes
from benchmarks.speed import gpu, gpu_steps, gpu_tables
from benchmarks.speed.bases import METHODS
from benchmarks.speed.gpu import Card, Row
from benchmarks.speed.gpu_steps import TorchStep

from model import Config

SMALL = Shapes(32, 48, 2, vocab=64)
FIRST = {row.part: row for row in reversed(gpu.tiny())}
WANTED = {
    "steps": {"steady_seconds", "refresh_seconds", "state_bytes", "compile_seconds"},
    "limited": {"limit_bytes", "peak_bytes", "tokens_per_second"},
    "training": {"tokens_per_second", "flop_utilisation", "step_seconds"},
    "probes": {"orthonormality", "energy", "refresh_seconds"},
}


LONG = {"steps", "limited", "training"}
PARTS = [pytest.param(x, marks=[pytest.mark.slow] * (x in LONG)) for x in WANTED]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_at_tiny_size(part: str) -> None:
    found = gpu.measured(FIRST[part])
    assert found.keys() >= WANTED[part]
    json.dumps(found)
    if part == "probes":
        assert found["energy"] > 0.5
        assert found["orthonormality"] < 1e-5


def test_the_command_measures_all_that_is_wanted() -> None:
    made = list(map(str, gpu.rows()))
    assert len(set(made)) == len(made)
    for start in (
        "steps: 7b bfloat16, stacked: galore_adamw8bit",
        "steps: 60m float32, stacked: galore_adamw",
        "steps: 60m float32, one leaf a matrix: galore_adamw",
        "limited: 7b bfloat16, 256 tokens, layerwise: galore_adamw8bit",
        "limited: 7b bfloat16, 2048 tokens, layerwise: galore_adamw8bit",
        "training: 60m bfloat16, 16384 tokens: galore_adamw",
        "training: 1b bfloat16, 4096 tokens: galore_adamw",
        *(f"probes: 768 x 3072 float32, rank 192: {x}" for x in METHODS),
    ):
        assert start in made
    for row in made:  # no AdamW with 16-bit moments alone
        if "bfloat16" in row and row.endswith("optax.adamw"):
            assert f"{row}, f32 moments" in made


def test_moments_in_f32_are_those_of_f32_weights() -> None:
    wide = {"w": jnp.linspace(-1, 1, 8)}
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    tx = subjects.with_f32_moments(optax.adamw(1e-2))
    state, plain = tx.init(narrow), optax.adamw(1e-2).init(exact)
    assert state[0].mu["w"].dtype == state[0].nu["w"].dtype == jnp.float32
    for _ in range(3):
        found, state = tx.update(narrow, state, narrow)
        expected, plain = optax.adamw(1e-2).update(exact, plain, exact)
    np.testing.assert_array_equal(state[0].nu["w"], plain[0].nu["w"])
    np.testing.assert_array_equal(found["w"], expected["w"].astype(jnp.bfloat16))


def test_flops_are_the_examples() -> None:
    config = Config.load("60m")
    tokens = 256
    matrices = 8 * (4 * 512**2 + 3 * 512 * 1376) + 512 * 32_000
    expected = 6 * matrices + 12 * 8 * 512 * tokens
    assert gpu_steps.flops_per_token(config, tokens) == expected


class Clock:
    """Seconds that pass only where a row says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def named(name: str, seconds: float) -> Row:
    class Subject:
        def measure(self) -> dict[str, Any]:
            return {"value": name}

        def __str__(self) -> str:
            return name

    return Row("steps", Subject(), seconds)


def test_rows_are_made_while_there_is_time() -> None:
    clock, made = Clock(), []

    def make(row: Row, left: float) -> str:
        made.append((str(row), left))
        clock.now += 40
        return "out of memory" if str(row).endswith("b") else ""

    wanted = [named("a", 20), named("b", 20), named("c", 30), named("d", 10)]
    missing = gpu.spend(100, wanted, make, clock)
    assert made == [("steps: a", 100), ("steps: b", 60), ("steps: d", 20)]
    assert missing == ["steps: b: out of memory", "steps: c: no time left"]


def test_a_row_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = []

    def run(command: list[str], env: dict[str, str], **rest: Any) -> Any:
        environments.append(env)
        if "steps: timeout" in command:
            raise subprocess.TimeoutExpired(command, 1)
        text = "Traceback\n  line 1\nRESOURCE_EXHAUSTED: 3 GB\n\n"
        return types.SimpleNamespace(returncode=1, stderr=text, stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    row, card = Row("limited", named("a", 0).subject, 0, 24e9), Card("h1", 96 * 10**9)
    assert card.make(row, 1.0) == "RESOURCE_EXHAUSTED: 3 GB"
    assert environments[0]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.2500"
    assert card.make(named("timeout", 0), 9.0) == "not done after 9 s"
    assert environments[1]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.9500"


def test_a_card_is_asked_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert Card.found() == Card("cpu", 0)


def test_the_record_has_the_rows_by_part_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    for name in "ab":
        gpu.keep(named(name, 0), "rtx_4090")
    gpu.record("rtx_4090", ["steps: c: no time left"])
    found = json.loads((tmp_path / "speed" / "gpu_rtx_4090.json").read_text())
    assert found["result"] == {"steps": {"a": {"value": "a"}, "b": {"value": "b"}}}
    assert "steps: c: no time left" in found["missing"]


def test_torch_steps_on_any_device() -> None:
    pytest.importorskip("torch")
    found = TorchStep("tiny", SMALL, "torch.optim.AdamW", "cpu").measure()
    assert found["steady_seconds"] > 0


def test_an_unknown_card_has_no_share_of_its_peak() -> None:
    row = {"model": "60m", "method": subjects.WIDE, "tokens": 1024, "peak_bytes": 5e8}
    row |= {"tokens_per_second": 1e3, "flop_utilisation": None, "never": False}
    row |= {"steady_seconds": 0.02, "refresh_seconds": 1e-4}
    found = gpu_tables.gpu_training({"training": {"a": row}})
    cells = (
        "60M, 1,024 tokens a step | `optax.adamw` | f32 | 1,000 | 20 |  |  | 0.50 GB"
    )
    assert found.splitlines()[2:] == [f"| {cells} |"]
    row["flop_utilisation"] = 0.25
    found = gpu_tables.gpu_training({"training": {"a": row}})
    assert "| 25.0 % |" in found


def test_a_refresh_of_the_model_is_the_sum_over_its_matrices() -> None:
    def row(method: str, n: int, seconds: float) -> dict[str, Any]:
        return {"method": method, "shape": [4096, n], "refresh_seconds": seconds}

    probes = {"a": row("power", 4096, 0.002), "b": row("power", 11008, 0.005)}
    probes["c"] = row("svd", 4096, 1.0)
    found = gpu_tables.gpu_refresh({"probes": probes})
    # 128 x 2 ms + 96 x 5 ms; svd lacks a shape.
    assert found.splitlines()[2:] == [
        "| power | 2.00 | 5.00 | 0.7 |",
        "| svd | 1,000 |  |  |",
    ]


def test_a_stacked_tree_holds_the_same_parameters() -> None:
    def count(tree: Any) -> int:
        return sum(x.size for x in jax.tree.leaves(shapes.abstract(tree)))

    assert count(SMALL.stacked()) == count(SMALL.tree())
    assert SMALL.stacked()["layers"]["mlp"]["up"]["kernel"] == (2, 32, 48)
    made = shapes.large_gradients({"a": (2, 8, 16), "b": (8,)}, "bfloat16")
    assert made["a"].dtype == jnp.bfloat16
    assert made["a"].shape == (2, 8, 16)
