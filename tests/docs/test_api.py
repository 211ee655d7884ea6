# SPDX-License-Identifier: Apache-2.0
"""The reference lists every public name once."""

import collections
import importlib
import pkgutil
import re
import types
from pathlib import Path

import pytest

import galore_optax

API = Path(__file__).resolve().parents[2] / "docs" / "api"
pytestmark = pytest.mark.skipif(not API.exists(), reason="an sdist has no docs")
MODULE = re.compile(r"\.\. currentmodule:: ([\w.]+)")
NAME = re.compile(r"\.\. auto(?:function|class|data|exception):: (\w+)")


def listed() -> list[str]:
    found, module = [], ""
    for path in sorted(API.glob("*.md")):
        for line in path.read_text().splitlines():
            if match := MODULE.match(line):
                module = match[1]
            elif match := NAME.match(line):
                found.append(f"{module}.{match[1]}")
    return found


def public() -> dict[int, str]:
    """By identity, since a package may offer what the library does."""
    packages = [
        name
        for _, name, is_package in pkgutil.iter_modules(galore_optax.__path__)
        if is_package and not name.startswith("_")
    ]
    modules = [galore_optax] + [
        importlib.import_module(f"galore_optax.{name}") for name in packages
    ]
    found: dict[int, str] = {}
    for module in modules:
        for name, value in vars(module).items():
            if not name.startswith("_") and not isinstance(value, types.ModuleType):
                found.setdefault(id(value), f"{module.__name__}.{name}")
    return found


def test_every_public_name_is_listed() -> None:
    names = set(public().values())
    assert {"galore_optax.galore", "galore_optax.memory.plan"} <= names
    assert names - set(listed()) == set()


def test_what_is_listed_is_public_and_stands_there_once() -> None:
    counts = collections.Counter(listed())
    assert set(counts) <= set(public().values())
    assert [name for name, count in counts.items() if count > 1] == []
