# SPDX-License-Identifier: Apache-2.0
"""Rivals in processes of their own, one of which runs at a time.

Two libraries in one process disturb one another: the threads of PyTorch's OpenMP and of
XLA's pools spin for a while after each call, on cores that the other needs. Here each
has its process and its state stays there; the parent lets one take a step, waits for
what still spins, and turns to the next. So the rivals alternate step by step, noise of
the machine meets all alike, and none meets another's threads.
"""

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

REST = 0.3  # seconds; libgomp spins for some milliseconds, Intel's OpenMP for 200


class Rival:
    """An object that lives in another process; `rival(name, ...)` calls its method."""

    def __init__(self, make: Callable[..., Any], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, make, arguments), daemon=True
        )
        self._process.start()
        theirs.close()
        self._answer()

    def __call__(self, name: str, *arguments: Any) -> Any:
        time.sleep(REST)
        self._ours.send((name, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            error, value = self._ours.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"the process ended with code {self._process.exitcode}; -9 means that"
                " the machine's memory was not enough."
            ) from None
        if error:
            raise RuntimeError(f"in the process of a rival:\n{error}")
        return value

    def close(self) -> None:
        self._ours.close()
        self._process.join()


def _serve(
    connection: Connection, make: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    try:
        subject = make(*arguments)
        connection.send((None, None))
        while True:
            name, given = connection.recv()
            connection.send((None, getattr(subject, name)(*given)))
    except EOFError:
        return
    except Exception:
        connection.send((traceback.format_exc(), None))
