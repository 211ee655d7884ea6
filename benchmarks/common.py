# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: where its result goes and what is noted beside it."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")

sys.path.insert(0, str(ROOT / "examples" / "llama"))


def machine() -> dict[str, Any]:
    """Processor, accelerator, versions, date and commit of this run."""
    import jax

    return {
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "galore_optax")),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("jax", "optax")},
    }


def device_bytes() -> int | None:
    """Memory of the first accelerator; asked in a process that lets go of it."""
    code = (
        "import jax; print((jax.devices()[0].memory_stats() or {}).get('bytes_limit'))"
    )
    everything = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "1.0",
    }
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, env=everything, capture_output=True, check=True)
    text = found.stdout.decode().strip()
    return int(text) if text.isdigit() else None


def width(model: str) -> int:
    from model import Config

    return Config.load(model).width


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def write(name: str, result: Any) -> None:
    """Writes `results/<name>.json`, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"machine": machine(), "result": result}, indent=1))
    partial.replace(path)
    print(f"wrote {path.relative_to(ROOT)}")
