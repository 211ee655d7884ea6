# SPDX-License-Identifier: Apache-2.0
"""The compilers themselves, each in an environment of its own, and no device."""

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def environment(folder: Path, extra: str) -> Path:
    """The interpreter of a new environment with `galore_optax[extra]`."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[{extra}]"]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot install the extra {extra}: {done.stderr[-300:]}")
    return python


@pytest.fixture(scope="module")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux":
        pytest.skip("the CUDA plugin is made for Linux")
    return environment(tmp_path_factory.mktemp("cuda"), "aot-cuda")


@pytest.fixture(scope="module")
def tpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux":
        pytest.skip("libtpu is made for Linux")
    return environment(tmp_path_factory.mktemp("tpu"), "aot-tpu")


def plan(
    python: Path, target: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", "benchmarks.memory.compile_plan", target, *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )


def differences(out: str) -> dict[str, float]:
    """Relative difference in per cent of each compared line."""
    found = re.findall(r"^(\S.*?)  .*?([+-]\d+\.\d)%$", out, re.MULTILINE)
    return {name: float(value) for name, value in found}


@pytest.mark.parametrize("method", ["adamw", "galore_adamw", "galore_adamw8bit"])
def test_the_estimate_is_that_of_the_cuda_compiler(cuda: Path, method: str) -> None:
    arguments = ["130m", "--method", method, "--remat", "--tokens", "256"]
    done = plan(cuda, "rtx4090", *arguments)
    assert done.returncode == 0, done.stderr
    found = differences(done.stdout)
    assert found["weights, state, tokens"] == 0.0
    assert abs(found["total"]) < 5
    assert "fits rtx4090" in done.stdout


def test_a_step_too_large_for_a_gpu_does_not_fit(cuda: Path) -> None:
    done = plan(cuda, "rtx4090", "7b", "--method", "adamw", "--remat")
    assert done.returncode == 1
    assert "does not fit rtx4090" in done.stdout


SEVEN_B = ("7b", "--method", "galore_adamw8bit", "--option", "rank=1024", "--remat")


def total_of(out: str) -> float:
    """GB in the compiler's column of the line of totals."""
    (totals,) = re.findall(r"^total +\S+ GB +(\S+) GB ", out, re.MULTILINE)
    return float(totals)


@pytest.mark.parametrize(("tokens", "limit"), [(256, 20.5), (2048, 22.5)])
def test_seven_billion_parameters_train_in_24_gb(
    cuda: Path, tokens: int, limit: float
) -> None:
    """One whole step, refresh included, for a card that is sold with 24 GB."""
    done = plan(cuda, "rtx4090", *SEVEN_B, "--layerwise", "--tokens", str(tokens))
    assert done.returncode == 0, done.stdout + done.stderr
    assert total_of(done.stdout) <= limit
    assert abs(differences(done.stdout)["total"]) < 5


def test_seven_billion_parameters_at_once_do_not(cuda: Path) -> None:
    done = plan(cuda, "rtx4090", *SEVEN_B, "--tokens", "256")
    assert done.returncode == 1
    assert 25.35 < total_of(done.stdout) <= 35


def test_seven_billion_parameters_train_on_a_v6e(tpu: Path) -> None:
    done = plan(tpu, "v6e", *SEVEN_B, "--layerwise", "--tokens", "256")
    assert done.returncode == 0, done.stdout + done.stderr
    assert total_of(done.stdout) <= 32


def test_no_array_of_a_leaf_in_more_bits_beside_16_bit_weights(cuda: Path) -> None:
    """For both cards, steady and with a refresh, with weight decay and without."""
    command = [cuda, "-m", "benchmarks.memory.compiled_step", "kernels", "--quick"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [x.split(" | ") for x in done.stdout.splitlines() if ", galore" in x]
    rows = [cells for cells in lines if len(cells) > 1]
    assert len(rows) == 2 * 3 * 2  # cards, optimizers, programs
    for name, kernels, _, conditionals, _, _, f32, *_, bf16, _ in rows:
        assert int(kernels) > 0
        assert (int(conditionals), int(f32)) == (0, 0), name
        if name.endswith("steady"):
            assert int(bf16) == 7, name  # the new weights, one array a leaf


def test_a_tpu_step_is_compiled(tpu: Path) -> None:
    done = plan(tpu, "v5e", "9m", "--method", "adamw")
    assert done.returncode == 0, done.stderr
    assert differences(done.stdout)["weights, state, tokens"] == pytest.approx(0, abs=2)


def test_what_a_tpu_compiler_refuses_does_not_fit(tpu: Path) -> None:
    done = plan(tpu, "v5e", "7b", "--method", "adamw", "--remat")
    assert done.returncode == 1
    assert "The compiler refused it." in done.stdout
    assert "Traceback" not in done.stderr


def test_an_environment_has_one_compiler(tpu: Path) -> None:
    done = plan(tpu, "h200", "9m")
    assert done.returncode == 2
    assert "aot-cuda" in done.stderr
