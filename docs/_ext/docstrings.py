# SPDX-License-Identifier: Apache-2.0
"""Docstrings as they are written here, made into reStructuredText.

`Leaf`s                          a name and its plural
as follows:                      what is indented after a blank line
                                 keeps its lines
    X = G Y
"""

import re
from typing import Any

from sphinx.application import Sphinx

_PLURAL = re.compile(r"(?<!`)(`[^`\s]+`)(?=\w)")
_BEFORE_NAPOLEON = 100


def prepared(lines: list[str]) -> list[str]:
    """The lines with both marked up; others are as they were."""
    text = [_PLURAL.sub(r"\1\\ ", line) for line in lines]
    pairs = zip(text, [*text[1:], ""], [*text[2:], "", ""], strict=False)
    return [
        f"{line}:" if _ends_in_one(line) and _begins(line, blank, block) else line
        for line, blank, block in pairs
    ]


def _ends_in_one(line: str) -> bool:
    return line.endswith(":") and not line.endswith("::")


def _begins(line: str, blank: str, block: str) -> bool:
    is_deeper = len(block) - len(block.lstrip()) > len(line) - len(line.lstrip())
    return not blank.strip() and bool(block.strip()) and is_deeper


def _process(
    app: Sphinx, what: str, name: str, found: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = prepared(lines)


def _skip(
    app: Sphinx, what: str, name: str, found: Any, skip: bool, options: Any
) -> bool | None:
    """Fields of a NamedTuple stand in its signature, and have no docstring."""
    is_field = str(found.__doc__).startswith("Alias for field number")
    return True if is_field else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process, priority=_BEFORE_NAPOLEON)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True}
