# SPDX-License-Identifier: Apache-2.0
"""Devices that are not there, and compilers that are not installed."""

import os

import jax
import pytest

from benchmarks.memory import assignment, compile_plan, targets
from benchmarks.memory.assignment import Assignment
from benchmarks.memory.compile_plan import comparison, verdict
from galore_optax import memory
from galore_optax.memory import _cli

OLD = "Used 25.47G of 15.75G hbm. Exceeds hbm capacity by 9.72G."
NEW = (
    "Ran out of memory on HBM, the total memory required for HLO temporaries (52.91G)"
    " exceeds available HBM (15.75G)."
)


class Failing:
    """A program that the compiler refuses."""

    def __init__(self, message: str):
        self.message = message

    def compile(self, compiler_options: object) -> None:
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {self.message}")


def versions(monkeypatch: pytest.MonkeyPatch, **found: str | None) -> None:
    known = {name.replace("_", "-"): version for name, version in found.items()}
    monkeypatch.setattr(targets, "_version", known.get)


def test_targets_know_their_memory() -> None:
    assert sorted(targets.targets()) == ["h200", "rtx4090", "v5e", "v6e"]
    assert targets.target("v5e").memory == 16 * 2**30
    assert targets.target("h200").memory > 140 * 10**9


def test_the_planner_knows_the_same_cards() -> None:
    known = {x.name: x.memory for x in targets.targets().values()}
    assert known.items() <= _cli.CARDS.items()


def test_a_missing_cuda_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, jaxlib="1.2.3")
    with pytest.raises(RuntimeError) as caught:
        targets.target("rtx4090").device()
    text = str(caught.value)
    assert 'pip install ".[aot-cuda]"' in text
    assert "jax-cuda12-plugin==1.2.3 jax-cuda12-pjrt==1.2.3" in text


def test_a_compiler_of_another_version_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = {"jax_cuda12_plugin": "1.2.3", "jax_cuda12_pjrt": "1.2.2"}
    versions(monkeypatch, jaxlib="1.2.3", **others)
    with pytest.raises(RuntimeError, match=r"installed: 1\.2\.3, 1\.2\.2"):
        targets.target("h200").device()


def test_a_missing_ptxas_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    same = dict.fromkeys(("jaxlib", "jax_cuda12_plugin", "jax_cuda12_pjrt"), "1.2.3")
    versions(monkeypatch, **same)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="nvidia-cuda-nvcc-cu12"):
        targets.target("h200").device()


def test_a_missing_tpu_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, jax="1.2.3")
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'aot-tpu\]" "jax\[tpu\]==1\.2\.3"'):
        targets.target("v6e").device()


def test_preparing_hides_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    targets.target("rtx4090").prepare()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1"


@pytest.mark.parametrize(("text", "used"), [(OLD, 25.47), (NEW, 52.91)])
def test_a_refused_program_does_not_fit(text: str, used: float) -> None:
    found = assignment._assign(Failing(text), targets.target("v5e"), tokens=4)
    assert found.total == round(used * 2**30)
    assert found.capacity == round(15.75 * 2**30)
    assert not found.fits


def test_other_failures_are_not_hidden() -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such"):
        assignment._assign(Failing("no such thing"), targets.target("v5e"), tokens=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [("rtx409 9m", "Did you mean 'rtx4090'"), ("", "compile_plan rtx4090 7b")],
)
def test_mistakes_are_named(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compile_plan.main(arguments.split()) == 2
    assert message in capsys.readouterr().err


def test_comparison_and_verdict() -> None:
    plan = memory.plan("9m", "adamw")
    inputs, alias = plan.weights + plan.state.total + 1028, plan.weights
    found = Assignment(
        "tiny", 10**8, inputs, 2 * plan.peak.total, alias + 8, alias, 1028
    )
    lines = comparison(plan, found).splitlines()
    assert lines[2].split()[-1] == "+0.0%"
    assert lines[3].split()[-1] == "-50.0%"
    assert found.total == inputs + 2 * plan.peak.total + 8
    assert "does not fit tiny" in verdict(found)
    assert "fits tiny" in verdict(Assignment("tiny", 10**9, 10**8))
