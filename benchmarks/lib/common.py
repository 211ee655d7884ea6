# SPDX-License-Identifier: Apache-2.0
"""What every benchmark shares: where its result goes and what is noted beside it."""

import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


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


def write(
    name: str, result: Any, missing: Sequence[str] = (), runs: "Runs | None" = None
) -> None:
    """Writes `results/<name>.json`, whole or not at all; a name begins with its room.

    `missing` names what was skipped or has still to be run, each with its reason;
    `runs` are those that the result is made of, where they may be of other days.
    """
    record = {"machine": machine(), "complete": not missing, "missing": list(missing)}
    if runs:
        record["runs"] = runs.origins()
    path = RESULTS / f"{name}.json"
    _replace(path, json.dumps(record | {"result": result}, indent=1) + "\n")
    print(f"wrote {path.relative_to(ROOT)}" + (", NOT complete" if missing else ""))


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


VARYING = ("date", "commit", "uncommitted_changes")  # of runs on one machine


class Runs:
    """Results of single runs by name, each kept in a file as soon as it ends.

    `results/<name>.runs.json` is committed like any result, so that a table can grow
    over several sittings, each run beside the machine and the commit that it had, and
    by several processes at once, each run being made by one of them.
    """

    def __init__(self, name: str):
        self.path = RESULTS / f"{name}.runs.json"
        self.found: dict[str, Any] = {}
        self._read()

    def get(self, key: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is on record under `key`, or else what `run()` gives now.

        Waits for a process that is making this run.
        """
        if key not in self.found:
            with _lock(f"{self.path}: {key}"):
                self._read()
                if key not in self.found:
                    self._add(key, run() | {"machine": machine()})
        return self.found[key]

    def made_elsewhere(self, key: str) -> bool:
        """Whether another process is making this run now."""
        try:
            with _lock(f"{self.path}: {key}", fcntl.LOCK_NB):
                self._read()
                return False
        except BlockingIOError:
            return True

    def origins(self) -> list[dict[str, Any]]:
        """Machines and versions of the runs, each with dates and commits."""
        found: dict[str, dict[str, Any]] = {}
        for run in self.found.values():
            made = {k: v for k, v in run["machine"].items() if k not in VARYING}
            group = found.setdefault(json.dumps(made, sort_keys=True), made)
            for name in ("date", "commit"):
                values = group.setdefault(f"{name}s", [])
                values += [x for x in [run["machine"][name]] if x not in values]
        return list(found.values())

    def _read(self) -> None:
        if self.path.exists():
            self.found |= json.loads(self.path.read_text())

    def _add(self, key: str, made: dict[str, Any]) -> None:
        with _lock(str(self.path)):
            self._read()
            self.found[key] = made
            _replace(self.path, json.dumps(self.found, indent=1) + "\n")


@contextlib.contextmanager
def _lock(name: str, flags: int = 0) -> Iterator[None]:
    """Held by one process at a time, until it ends at the latest."""
    folder = Path(tempfile.gettempdir()) / "galore_optax_locks"
    folder.mkdir(exist_ok=True)
    path = folder / hashlib.sha256(name.encode()).hexdigest()
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        yield
