# SPDX-License-Identifier: Apache-2.0
"""The package as others get it: a source tree, an sdist, a wheel."""

import email
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "galore_optax"
BESIDE = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}

# Nothing of the tests' environment is on the path but what the package depends on.
FROM_SOURCE = f"""
import sys
sys.path[:] = [{str(ROOT)!r}, *(p for p in sys.path if p)]
import importlib.metadata as metadata
def version(name):
    raise metadata.PackageNotFoundError(name)
metadata.version = version
import galore_optax
print(galore_optax.__version__)
"""

SMOKE = """
import jax, jax.numpy as jnp, galore_optax
assert galore_optax.__file__.startswith({prefix!r}), galore_optax.__file__
tx = galore_optax.galore_adamw(1e-2, rank=4)
params = {{"dense": {{"kernel": jnp.ones((16, 32)), "bias": jnp.ones(32)}}}}
updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
print(galore_optax.describe(tx, params))
assert galore_optax.memory.config_path("7b").is_file()
print(galore_optax.__version__)
"""


def run(python: Path | str, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [str(python), *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_source_tree_that_is_not_installed_can_be_imported(tmp_path: Path) -> None:
    printed = run(sys.executable, "-c", FROM_SOURCE, cwd=tmp_path)
    assert printed.split() == ["0.0.0+source"]


def version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_the_release_is_dated_and_cited_alike() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    latest, date = re.findall(r"^## (\S+), (\d{4}-\d\d-\d\d)$", changes, re.MULTILINE)[
        0
    ]
    citation = (ROOT / "CITATION.cff").read_text()
    assert latest == version()
    assert f"\nversion: {latest}\ndate-released: {date}\n" in citation


def test_the_tested_versions_are_those_that_are_tested() -> None:
    pairs = re.search(r"PAIRS:-(.*)\}", (ROOT / ".ci" / "compat").read_text())
    assert pairs is not None
    page = (ROOT / "docs" / "versions.md").read_text()
    told = re.findall(r"^\| (3\.\d+) \| (0\.\d+) \|", page, re.MULTILINE)
    assert [f"{python}:{jax}" for python, jax in told] == pairs[1].split()


def files_of_the_package() -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = "-m", "hatchling", "build", "-d", str(folder)
    run(sys.executable, *command, cwd=ROOT)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


@pytest.mark.slow
def test_wheel_and_sdist_hold_every_file(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        names = set(wheel.namelist())
        metadata = next(name for name in names if name.endswith("/METADATA"))
        fields = email.message_from_bytes(wheel.read(metadata))
    assert {name for name in names if ".dist-info" not in name} == (
        files_of_the_package()
    )
    assert "galore_optax/py.typed" in names
    assert fields["License-Expression"] == "Apache-2.0"
    with tarfile.open(built["sdist"]) as sdist:
        inside = {name.partition("/")[2] for name in sdist.getnames()}
    assert files_of_the_package() | BESIDE <= inside


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_installs_into_an_empty_environment(
    built: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    folder = tmp_path / "empty"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = "-m", "pip", "install", "--quiet", "--disable-pip-version-check"
    run(python, *install, str(built[kind]), cwd=tmp_path)
    printed = run(python, "-c", SMOKE.format(prefix=str(folder)), cwd=tmp_path)
    assert "dense/kernel" in printed
    assert printed.split()[-1] == version()
