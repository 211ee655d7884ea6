# SPDX-License-Identifier: Apache-2.0
"""Results on record: where they go, what is noted beside them, how they grow."""

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def parser(doc: str | None, quick: bool = False) -> argparse.ArgumentParser:
    """With the first line of `doc`, and `--quick` if there is such a run."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    if quick:
        made.add_argument("--quick", action="store_true", help="small, not recorded")
    return made


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


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def load(name: str) -> Any:
    """A result on record.

    Raises:
      FileNotFoundError: there is none.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run the benchmark that makes it.")
    return json.loads(path.read_text())["result"]


def write(
    name: str,
    result: Any,
    missing: Sequence[str] = (),
    runs: "Runs | None" = None,
    quick: bool = False,
) -> None:
    """Writes `results/<name>.json`, whole or not at all; a name begins with its room.

    `missing` names what was skipped or has still to be run, each with its reason;
    `runs` are those that the result is made of, where they may be of other days. A
    quick run, which shows that a script works, is not recorded.
    """
    for reason in missing:
        print(f"missing: {reason}")
    if quick:
        print(f"quick: {name} is not recorded")
        return
    record = {"machine": machine(), "complete": not missing, "missing": list(missing)}
    if runs:
        record["runs"] = runs.origins()
    _replace(f"{name}.json", record | {"result": result})
    print(f"wrote {name}.json" + (", NOT complete" if missing else ""))


def _replace(name: str, value: Any) -> None:
    path = RESULTS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


VARYING = ("date", "commit", "uncommitted_changes")  # of runs on one machine
Make = Callable[[], dict[str, Any]]


class Runs:
    """Results of single runs by name, each kept in a file as soon as it ends.

    `results/<name>.runs.json` is committed like any result, so that a table can grow
    over several sittings, each run beside the machine and the commit that it had, and
    by several processes at once, each run being made by one of them.
    """

    def __init__(self, name: str):
        self.name = f"{name}.runs.json"
        self.found: dict[str, Any] = {}
        self._read()

    def get(self, key: str, make: Make) -> dict[str, Any]:
        """What is on record under `key`, or else what `make()` gives now.

        Waits for a process that is making this run.
        """
        if key not in self.found:
            with _lock(f"{RESULTS / self.name}: {key}"):
                self._read()
                if key not in self.found:
                    self._add(key, make() | {"machine": machine()})
        return self.found[key]

    def fill(self, plan: Mapping[str, Make], minutes: float) -> list[str]:
        """Makes what is not on record and what no other process makes.

        Starts nothing after so many minutes; returns what is missing then.
        """
        end = time.monotonic() + 60 * minutes
        for key, make in plan.items():
            taken = key in self.found or self.made_elsewhere(key)
            if not taken and time.monotonic() < end:
                self.get(key, make)
        return [f"{key}: still to be run" for key in plan if key not in self.found]

    def made_elsewhere(self, key: str) -> bool:
        """Whether another process is making this run now."""
        try:
            with _lock(f"{RESULTS / self.name}: {key}", fcntl.LOCK_NB):
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
        path = RESULTS / self.name
        if path.exists():
            self.found |= json.loads(path.read_text())

    def _add(self, key: str, made: dict[str, Any]) -> None:
        with _lock(str(RESULTS / self.name)):
            self._read()
            self.found[key] = made
            _replace(self.name, self.found)


def show_list(runs: Runs, plan: Mapping[str, Any]) -> None:
    """What of a plan is on record."""
    for key in plan:
        print(f"{'on record' if key in runs.found else 'to be run'}  {key}")


@contextlib.contextmanager
def _lock(name: str, flags: int = 0) -> Iterator[None]:
    """Held by one process at a time, until it ends at the latest."""
    folder = Path(tempfile.gettempdir()) / "galore_optax_locks"
    folder.mkdir(exist_ok=True)
    path = folder / hashlib.sha256(name.encode()).hexdigest()
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
        yield
