# SPDX-License-Identifier: Apache-2.0
"""The measurements for a GPU, at tiny size on a CPU, and the counter of programs."""

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

from benchmarks.lib import common, gpu_shapes
from benchmarks.lib.subjects import Shapes
from benchmarks.memory import compiled_step, hlo
from benchmarks.speed import gpu, gpu_steps, gpu_tables, gpu_training
from benchmarks.speed.gpu import Budget, Row
from benchmarks.speed.gpu_torch import TorchStep
from galore_optax import memory

from model import Config

SMALL = Shapes(32, 48, 2, vocab=64)
FIRST = {row.part: row for row in reversed(gpu.tiny())}
WANTED = {
    "steps": {"steady_seconds", "refresh_seconds", "state_bytes", "compile_seconds"},
    "limited": {"limit_bytes", "peak_bytes", "tokens_per_second"},
    "training": {"tokens_per_second", "flop_utilisation", "step_seconds"},
    "probes": {"orthonormality", "energy", "refresh_seconds"},
}


LONG = {"limited", "training"}
PARTS = [pytest.param(x, marks=[pytest.mark.slow] * (x in LONG)) for x in WANTED]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_at_tiny_size(part: str) -> None:
    found = gpu.measured(FIRST[part])
    assert found.keys() >= WANTED[part]
    json.dumps(found)


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
        *(f"probes: 768 x 3072 float32, rank 192: {x}" for x in gpu.METHODS),
    ):
        assert start in made
    for row in made:  # no AdamW with 16-bit moments alone
        if "bfloat16" in row and row.endswith("optax.adamw"):
            assert f"{row}, f32 moments" in made


def test_moments_in_f32_are_those_of_f32_weights() -> None:
    wide = {"w": jnp.linspace(-1, 1, 8)}
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    tx = gpu_steps.with_f32_moments(optax.adamw(1e-2))
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
    assert gpu_training.flops_per_token(config, tokens) == expected


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
    missing = Budget(100, make, clock).spend(wanted)
    assert made == [("steps: a", 100), ("steps: b", 60), ("steps: d", 20)]
    assert missing == ["steps: b: out of memory", "steps: c: no time left"]


def test_a_row_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    environments = []

    def run(command: list[str], env: dict[str, str], **rest: Any) -> Any:
        environments.append(env)
        if "timeout" in command[-1]:
            raise subprocess.TimeoutExpired(command, 1)
        text = "Traceback\n  line 1\nRESOURCE_EXHAUSTED: 3 GB\n\n"
        return types.SimpleNamespace(returncode=1, stderr=text, stdout="")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(common, "device_bytes", lambda: 96e9)
    row = Row("limited", named("a", 0).subject, 0, 24e9)
    assert gpu.in_a_process(row, 1.0) == "RESOURCE_EXHAUSTED: 3 GB"
    assert environments[0]["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.2500"
    assert gpu.in_a_process(named("timeout", 0), 9.0) == "not done after 9 s"
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" not in environments[1]


def test_the_record_names_the_card_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    device = types.SimpleNamespace(device_kind="NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    for name in "ab":
        gpu.keep(named(name, 0))
    gpu.record(["steps: c: no time left"])
    found = json.loads((tmp_path / "speed" / "gpu_geforce_rtx_4090.json").read_text())
    assert found["result"] == {"steps": {"a": {"value": "a"}, "b": {"value": "b"}}}
    assert found["machine"]["device"] == "NVIDIA GeForce RTX 4090"
    assert "steps: c: no time left" in found["missing"]


def test_torch_steps_on_any_device() -> None:
    pytest.importorskip("torch")
    found = TorchStep("tiny", SMALL, "torch.optim.AdamW", "cpu").measure()
    assert found["steady_seconds"] > 0


def test_an_unknown_card_has_no_share_of_its_peak() -> None:
    row = {"model": "60m", "method": gpu.WIDE, "tokens": 1024, "peak_bytes": 5e8}
    row |= {"tokens_per_second": 1e3, "flop_utilisation": None}
    found = gpu_tables.gpu_training({"training": {"a": row}})
    cells = "60M, 1,024 tokens a step | `optax.adamw` | f32 | 1,000 |  | 0.50 GB"
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
        return sum(x.size for x in jax.tree.leaves(gpu_shapes.abstract(tree)))

    assert count(gpu_shapes.stacked(SMALL)) == count(SMALL.tree())
    assert gpu_shapes.stacked(SMALL)["layers"]["mlp"]["up"]["kernel"] == (2, 32, 48)
    made = gpu_shapes.gradients({"a": (2, 8, 16), "b": (8,)}, "bfloat16")
    assert made["a"].dtype == jnp.bfloat16
    assert made["a"].shape == (2, 8, 16)


# A program as XLA prints it: a product and a fusion in a loop of three turns.
PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p0: bf16[8,16], p1: bf16[8,16]) -> bf16[8,16] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %wide = f32[8,16]{1,0} convert(%p0)
  ROOT %add = bf16[8,16]{1,0} add(%p0, %p1)
}

%body (s: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %s = (s32[], bf16[8,16]{1,0}) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%s), index=1
  %wide.1 = f32[16,8]{0,1} fusion(%x), kind=kLoop, calls=%fused
  %gemm = (bf16[8,16]{1,0}, s8[64]{0}) custom-call(%x), custom_call_target="__cublas$gemm"
  %n = s32[] get-tuple-element(%s), index=0
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%n, %x)
}

%condition (s: (s32[], bf16[8,16])) -> pred[] {
  %s.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  ROOT %less = pred[] fusion(%s.1), kind=kLoop, calls=%fused
}

ENTRY %main (w: bf16[8,16]) -> bf16[8,16] {
  %w = bf16[8,16]{1,0} parameter(0)
  %copy.1 = bf16[8,16]{1,0} copy(%w)
  %c = (s32[], bf16[8,16]{1,0}) tuple(%w)
  %while.1 = (s32[], bf16[8,16]{1,0}) while(%c), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = bf16[8,16]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def test_a_program_is_counted_as_it_runs() -> None:
    program = hlo.Program.parse(PROGRAM)
    found = compiled_step.counts(program, {(8, 16)})
    assert found == {
        "kernels": 4,  # copy, wide.1, gemm, less: none of the fusion's own
        "products": 1,
        "conditionals": 0,
        "loops": [{"depth": 0, "trips": 3, "kernels": 3}],
        "f32_arrays_of_leaf_size": 1,  # transposed or not
        "bf16_arrays_of_leaf_size": 2,
        "moved_of_leaf_size": 1,
    }


def test_partial_sums_are_no_array_of_the_leaf() -> None:
    leaves = [(2, 32, 16)]
    assert hlo.Array("f32", (2, 16, 32)).is_like(leaves)
    assert hlo.Array("f32", (64, 1, 16)).is_like(leaves)
    assert not hlo.Array("f32", (2, 4, 8, 16)).is_like(leaves)
    assert not hlo.Array("f32", (2, 32, 32)).is_like(leaves)


def test_every_optimizer_is_compiled_for_every_target() -> None:
    made = list(map(str, compiled_step.cases(["h200"])))
    assert made[:3] == [
        "h200, optax.adamw, steady",
        "h200, galore(adam), steady",
        "h200, galore(adam), refresh",
    ]
    assert compiled_step.projected(SMALL) == {(2, 32, 32), (2, 32, 48), (2, 48, 32)}


def test_a_step_is_compiled_for_a_card_that_is_not_there() -> None:
    try:
        memory.target("h200").device()
    except RuntimeError as error:
        pytest.skip(str(error))
    case = compiled_step.Case("h200", "galore(adam)", False)
    found = compiled_step.compile_case(case, Shapes(256, 512, 2, vocab=256), 64)
    assert found["f32_arrays_of_leaf_size"] == 0
    assert found["products"] == 14
    assert not found["loops"]
