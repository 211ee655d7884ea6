# SPDX-License-Identifier: Apache-2.0
"""Brings the numbers of README and docs in line with `results/`.

    results/<name>.json -> tables.py -> between the marks of a document
    results/<name>.json -> claims.py -> must be words of a document

A document marks a table by `<!-- table: NAME -->` and `<!-- end -->`; what lies between
is written by `tables.TABLES[NAME]`; between `<!-- source: NAME -->` and the end stands
the machine that a result comes from. A number in running text is a claim: its sentence
is rendered and looked for. A number that is neither is reported, unless `claims.py`
lists it as no measurement.

    python -m benchmarks.lib.report          # writes tables, says what is wrong
    python -m benchmarks.lib.report --check  # writes nothing
"""

import argparse
import json
import re
from collections.abc import Callable
from typing import Any

from benchmarks.lib import cells, claims, common, tables

ROOT = common.ROOT
DOCUMENTS = (
    "README.md",
    "benchmarks/README.md",
    "examples/llama/README.md",
    "examples/finetune/README.md",
    "docs/gpu.md",
    "docs/memory.md",
    "docs/migrating.md",
    "docs/results.md",
)
_BLOCK = re.compile(
    r"(<!-- (table|source): ([\w/]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL
)
# Where numbers are code, addresses or names of versions.
_NO_TEXT = re.compile(
    r"^```.*?^```|^(?: {4}|\t).*?$|`[^`]*`|\]\([^)]*\)|https?://\S+",
    re.MULTILINE | re.DOTALL,
)
# A measurement has a decimal point, a comma of thousands, or a unit behind it.
_UNIT = (
    r"(?:\s?(?:%|x\b|×|times\b|GB\b|MB\b|kB\b|bytes\b|s\b|ms\b|seconds\b|minutes\b))"
)
_NUMBER = re.compile(
    rf"(?<![\w.,])[+−-]?(?:\d{{1,3}}(?:,\d{{3}})+|\d+\.\d+|\d+(?={_UNIT}))(?:\.\d+)?(?![\w])"
)


def load(name: str) -> Any:
    """A result on record."""
    return json.loads((common.RESULTS / f"{name}.json").read_text())["result"]


def render(text: str, load: Callable[[str], Any] = load) -> str:
    """A document with its tables written anew.

    Raises:
      ValueError: a mark names no table.
    """

    def block(match: re.Match[str]) -> str:
        mark, kind, name, _, end = match.groups()
        made = cells.provenance(name) if kind == "source" else _table(name, load)
        return f"{mark}{made}\n{end}"

    return _BLOCK.sub(block, text)


def _table(name: str, load: Callable[[str], Any]) -> str:
    if name not in tables.TABLES:
        known = ", ".join(sorted(tables.TABLES))
        raise ValueError(f"no table is called {name!r}; known: {known}.")
    return tables.TABLES[name](load)


def _words(text: str) -> str:
    return " ".join(text.replace("**", "").split())


def unfounded(path: str, text: str, load: Callable[[str], Any] = load) -> list[str]:
    """Claims that a document does not make as the results have it."""
    words = _words(text)
    expected = [claim.render(load) for claim in claims.CLAIMS if claim.path == path]
    return [sentence for sentence in expected if _words(sentence) not in words]


def _prose(text: str) -> str:
    return _words(_NO_TEXT.sub(" ", text))


def uncovered(path: str, text: str, load: Callable[[str], Any] = load) -> list[str]:
    """Numbers in running text that no result stands behind."""
    words = _prose(_BLOCK.sub(" ", text))
    made = [claim.render(load) for claim in claims.CLAIMS if claim.path == path]
    for sentence in (*made, *claims.NOT_MEASURED):
        words = words.replace(_prose(sentence), " ")
    return [
        f"{match[0]} in '...{words[max(0, match.start() - 40) : match.end() + 20]}...'"
        for match in _NUMBER.finditer(words)
    ]


def problems(path: str, text: str) -> list[str]:
    """What is wrong with a document, one line each."""
    outdated = ["a table differs from its result"] if render(text) != text else []
    absent = [f"the results say: {sentence}" for sentence in unfounded(path, text)]
    bare = [f"no result behind {number}" for number in uncovered(path, text)]
    return [f"{path}: {line}" for line in (*outdated, *absent, *bare)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    found = []
    for name in DOCUMENTS:
        path = ROOT / name
        if not arguments.check:
            path.write_text(render(path.read_text()))
        found += problems(name, path.read_text())
    print("\n".join(found) or "every number comes from a result")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
