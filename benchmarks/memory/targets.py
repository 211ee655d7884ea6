# SPDX-License-Identifier: Apache-2.0
"""Accelerators that need not be there to compile for them."""

import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import shutil
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

_FOLDER = Path(__file__).with_name("descriptions")
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # the lock is for devices, and none is used
}
_SIZE = re.compile(r"device_memory_size: (\d+)")


@dataclasses.dataclass(frozen=True)
class Target:
    """A device to compile for."""

    name: str
    platform: str  # "cuda" or "tpu"
    topology: str
    memory: int  # bytes of one device

    def prepare(self) -> None:
        """Sets what JAX's backends read when they start, so that none sees a device.

        Has an effect only before the first array is made in a process.
        """
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # of XLA, about devices
        if self.platform == "tpu":
            os.environ.update(_TPU_ENVIRONMENT)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        jax.config.update("jax_platforms", "cpu")

    def device(self) -> Any:
        """A device of this kind, which is not there; raises as `devices` does."""
        return self.devices()[0]

    def devices(self) -> Any:
        """All devices of the topology, which are not there.

        Raises:
          RuntimeError: their compiler is not installed; how to install it is said.
        """
        _check_compiler(self)
        config = {} if self.platform == "tpu" else {"target_config": self.description()}
        topology = {"topology": self.topology} if config else {}
        name = "" if config else self.topology
        return topologies.get_topology_desc(
            name, self.platform, **config, **topology
        ).devices

    def description(self) -> str:
        """XLA's description of a GPU."""
        return (_FOLDER / f"{self.name}.txtpb").read_text()


def _gpu(name: str) -> Target:
    text = (_FOLDER / f"{name}.txtpb").read_text()
    size = _SIZE.search(text)
    assert size is not None
    return Target(name, "cuda", "1x1x1", int(size[1]))


def targets() -> dict[str, Target]:
    """Every known target by name."""
    tpus = {"v5e": 16 * 2**30, "v6e": 32 * 2**30}
    found = [_gpu(path.stem) for path in sorted(_FOLDER.glob("*.txtpb"))]
    found += [Target(name, "tpu", f"{name}:2x2", size) for name, size in tpus.items()]
    return {target.name: target for target in found}


def target(name: str) -> Target:
    """The target called `name`.

    Raises:
      ValueError: there is none; the nearest is offered.
    """
    known = targets()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown target {name!r}.{hint} Known: {', '.join(known)}.")
    return known[name]


def _check_compiler(target: Target) -> None:
    if target.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise RuntimeError(_no_tpu(target))
        return
    versions = [_version("jax-cuda12-plugin"), _version("jax-cuda12-pjrt")]
    if versions != [_version("jaxlib")] * 2:
        raise RuntimeError(_no_cuda(target, versions))
    if not _has_ptxas():
        raise RuntimeError(
            f"compiling for {target.name} needs ptxas, which is not on the PATH:"
            " pip install nvidia-cuda-nvcc-cu12, or install the CUDA toolkit."
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _has_ptxas() -> bool:
    return (
        shutil.which("ptxas") is not None
        or _version("nvidia-cuda-nvcc-cu12") is not None
    )


def _no_cuda(target: Target, versions: list[str | None]) -> str:
    ours = _version("jaxlib")
    found = ", ".join(str(version or "none") for version in versions)
    packages = f"jax-cuda12-plugin=={ours} jax-cuda12-pjrt=={ours}"
    return (
        f"compiling for {target.name} needs jax-cuda12-plugin and jax-cuda12-pjrt of"
        f" jaxlib's version, {ours}; installed: {found}. In an environment of its own,"
        ' in a clone: pip install ".[aot-cuda]"; or, into this one: pip install'
        f" --no-deps {packages} nvidia-cuda-nvcc-cu12"
    )


def _no_tpu(target: Target) -> str:
    return (
        f"compiling for {target.name} needs libtpu, which is not installed. In an"
        ' environment without CUDA plugins, in a clone: pip install ".[aot-tpu]"'
        f' "jax[tpu]=={_version("jax")}"'
    )
