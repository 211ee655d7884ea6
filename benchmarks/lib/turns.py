# SPDX-License-Identifier: Apache-2.0
"""Rivals in processes of their own, one of which runs at a time.

Two libraries in one process disturb one another: the threads of PyTorch's OpenMP and of
XLA's pools spin for a while after each call, on cores that the other needs. Here each
has its process and its state stays there; the parent lets one take a step, waits for
what still spins, and turns to the next. So the rivals alternate step by step, noise of
the machine meets all alike, and none meets another's threads.
"""

import concurrent.futures
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

REST = 0.3  # seconds; libgomp spins for some milliseconds, Intel's OpenMP for 200
_subject: Any = None  # of a rival's process


class Rival:
    """An object that lives in another process; `rival(name, ...)` calls its method."""

    def __init__(self, make: Callable[..., Any], *arguments: Any):
        self._process = concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn")
        )
        self._process.submit(_start, make, arguments).result()

    def __call__(self, name: str, *arguments: Any) -> Any:
        time.sleep(REST)
        return self._process.submit(_call, name, arguments).result()

    def close(self) -> None:
        self._process.shutdown()


def _start(make: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _subject
    _subject = make(*arguments)


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_subject, name)(*arguments)
