# SPDX-License-Identifier: Apache-2.0
"""Where in the user's code an operation stands."""

import os
from typing import Any

import jax

_NOT_USERS = (
    f"{os.sep}site-packages{os.sep}",
    f"{os.sep}dist-packages{os.sep}",
    os.path.dirname(jax.__file__) + os.sep,
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
    "<",  # code without a file
)


def place_of(equation: Any) -> str:
    """`file:line` of the innermost frame in code that was not installed."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback else ():
        if not any(part in frame.file_name for part in _NOT_USERS):
            return f"{frame.file_name}:{frame.line_num}"
    return "an unknown place"
