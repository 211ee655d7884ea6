# SPDX-License-Identifier: Apache-2.0
"""Commands that pages show are understood by the programs that they start."""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tyro

from galore_optax.memory._cli import parser

import classify
import recipe
import sample
import settings

ROOT = Path(__file__).resolve().parents[2]
PAGES = "README.md", "docs/**/*.md", "examples/*/*.md", "benchmarks/*.md"
COMMAND = re.compile(
    r"(?:^ {4}|`)(?:\S*/)?python"
    r" ((?:-m (?:galore_optax |benchmarks\.)|examples/)[^`\n]*)",
    re.MULTILINE,
)
PARSERS: dict[str, Callable[[Sequence[str]], Any]] = {
    "examples/llama/train.py": lambda told: settings.parse(list(told)),
    "examples/llama/sample.py": lambda told: tyro.cli(sample.Request, args=told),
    "examples/finetune/finetune.py": lambda told: recipe.parse(list(told)),
    "examples/vit/classify.py": lambda told: tyro.cli(classify.Run, args=told),
    "galore_optax": lambda told: parser().parse_args(told),
}
NAME = "galore_optax", "plan"  # of the planner, in a sentence
STANDS_FOR = {"I": "0"}  # the number of a process


def commands() -> list[tuple[str, ...]]:
    """A program or a module and its arguments, each once."""
    found = {}
    for place in PAGES:
        for page in sorted(ROOT.glob(place)):
            for line in COMMAND.findall(re.sub(r"\\\n\s*", "", page.read_text())):
                words = [STANDS_FOR.get(x, x) for x in shlex.split(line, comments=True)]
                found[tuple(words[words[0] == "-m" :])] = None
    return [words for words in found if words != NAME]


def test_commands_are_found() -> None:
    assert {words[0] for words in commands()} >= set(PARSERS)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone in which a reader has put text, and run what comes before."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "notes" / "of_mine").mkdir(parents=True)
    (tmp_path / "notes" / "of_mine" / "one.txt").write_text("A text.")
    (tmp_path / "out" / "mine").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_is_understood(
    words: tuple[str, ...], clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone)
    program, *told = words
    if program.startswith("benchmarks."):
        assert (ROOT / program.replace(".", "/")).with_suffix(".py").is_file()
    elif program in PARSERS and "--help" not in told:
        PARSERS[program](told)
    else:
        assert (ROOT / program).is_file()
