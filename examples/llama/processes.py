# SPDX-License-Identifier: Apache-2.0
"""Several processes that train together, on one host or on many, by `jax.distributed`.

Each has the same settings and reads the same batches, of which it keeps the rows of its
own devices. Process 0 writes metrics and pictures, and all of them checkpoints. If one
dies, the others end within `NOTICED` seconds, and say where the run goes on from.
"""

import contextlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

NOTICED = 30  # seconds at most until a process ends after another died
_HEARTBEAT = 15  # seconds without one after which a process counts as dead
# Not known beforehand: JAX ends a process without a chance for Python to say anything.
_LAST_WORDS = """
import pathlib, sys
if sys.stdin.read() != "done":
    folder = pathlib.Path(sys.argv[2])
    steps = sorted(int(p.name) for p in folder.glob("[0-9]*") if p.name.isdigit())
    whole = ", ".join(map(str, steps)) or "none"
    print(sys.argv[1], f"Whole checkpoints in {folder}: {whole}.", file=sys.stderr)
"""


Fields = dict[str, Any]  # settings of a run, as JSON


def check(count: int, number: int, coordinator: str, axes: dict[str, int]) -> None:
    """Refuses what does not add up, before anything is started."""
    if not 0 <= number < count:
        raise ValueError(
            f"process={number} of processes={count}: they are numbered from 0."
        )
    if count > 1 and not (coordinator and axes):
        raise ValueError(
            f"processes={count} need coordinator=HOST:PORT, where process 0 listens,"
            " and a mesh of all their devices, such as mesh fsdp=8."
        )


def writes() -> bool:
    """Whether this process writes metrics and pictures, and talks."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """What is inside is done by process 0, and then by all others."""
    if not writes():
        multihost_utils.sync_global_devices("first process")
    yield
    if writes() and jax.process_count() > 1:
        multihost_utils.sync_global_devices("first process")


@contextlib.contextmanager
def together(run: Fields) -> Iterator[None]:
    """Joins the other processes of `run`; leaves when all are done, or one failed.

    Must come before anything is computed. One process alone does nothing.

    Raises:
      ValueError: the settings of the processes differ; how is said.
    """
    if run["processes"] == 1:
        yield
        return
    with _last_words(run):
        _join(run)
        try:
            check_same(run)
            yield
        except BaseException as error:
            _leave_at_once(error)
        jax.distributed.shutdown()


def _join(run: Fields) -> None:
    # CPUs have no collectives between processes otherwise.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would swallow SIGTERM, and wait for the others.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        run["coordinator"],
        run["processes"],
        run["process"],
        heartbeat_timeout_seconds=_HEARTBEAT,
        shutdown_timeout_seconds=_HEARTBEAT,
    )


def _leave_at_once(error: BaseException) -> None:
    """Without waiting at exit for processes that wait for this one."""
    if isinstance(error, ValueError | OSError):
        print(f"error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextlib.contextmanager
def _last_words(run: Fields) -> Iterator[None]:
    message = (
        f"process {run['process']} of {run['processes']} ended before the run did, by"
        " an error or because another process died: see above. The same command goes"
        " on from the last checkpoint, with any number of processes and any mesh."
    )
    folder = str(Path(run["out"]) / "checkpoints")
    words = [sys.executable, "-c", _LAST_WORDS, message, folder]
    # A session of its own, or Ctrl-C would end it too.
    watcher = subprocess.Popen(
        words, stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    yield
    watcher.communicate("done")


def check_same(run: Fields) -> None:
    """Raises the same error in every process, if their settings differ."""
    ours = run | {"process": 0}
    first, *others = (json.loads(text) for text in _gathered(json.dumps(ours)))
    for number, theirs in enumerate(others, 1):
        found = [f"{k} is {v!r}" for k, v in theirs.items() if v != first[k]]
        expected = [f"{k} is {first[k]!r}" for k, v in theirs.items() if v != first[k]]
        if found:
            raise ValueError(
                f"processes with different settings: in process 0"
                f" {', '.join(expected)}, in process {number} {', '.join(found)}."
                " Start all with the same command, but for --process."
            )


def _gathered(text: str) -> list[str]:
    """That of every process."""
    gather = multihost_utils.process_allgather
    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = np.ravel(gather(np.int32(len(encoded))))
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(encoded)] = encoded
    rows = gather(padded).reshape(len(sizes), -1)
    return [bytes(row[:n]).decode() for row, n in zip(rows, sizes, strict=True)]
