# SPDX-License-Identifier: Apache-2.0
"""CPU devices, and one folder of compiled programs; set before JAX starts.

Eight devices stand for a mesh; with GALORE_OPTAX_TEST_DEVICES=1 there is one, as most
users have it.

Many tests compile the same program: all workers and subprocesses of one run share what
they compiled, and nothing outlives the run.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import jax
import jaxlib.version
import pytest

_devices = os.environ.get("GALORE_OPTAX_TEST_DEVICES", "8")
_flags = [
    f"--xla_force_host_platform_device_count={_devices}",
    # A program in 32 parts for as many cores is a third more work; programs are small.
    "--xla_cpu_parallel_codegen_split_count=1",
]
if jaxlib.version.__version_info__ < (0, 11):
    # Its emitters for fusions take three times as long to compile; later versions have
    # no others.
    _flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_flags])
os.environ.setdefault("JAX_PLATFORMS", "cpu")

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.mkdtemp(prefix="galore_optax_compiled_")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


# What is collected and what a module's fixtures make is compiled as the tests are.
jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def _effort(request: pytest.FixtureRequest) -> Iterator[None]:
    optimized = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", True)
