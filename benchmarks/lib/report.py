# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of README and docs from the records in `results`.

    results/<room>/<name>.json -> <room>/tables.py -> between the marks of a document

A document marks a table by `<!-- table: NAME -->` and `<!-- end -->`; between
`<!-- source: ROOM/NAME -->` and the end stands where and when a record was made.
Measured numbers stand there and nowhere else: prose points at them.

    python -m benchmarks.lib.report          # writes
    python -m benchmarks.lib.report --check  # fails if it would change a document
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import benchmarks.lib.front_tables
import benchmarks.memory.tables
import benchmarks.speed.gpu_tables
import benchmarks.speed.tables
import benchmarks.training.frontier_tables
import benchmarks.training.tables
import benchmarks.why.tables  # noqa: F401  # each registers its tables
from benchmarks.lib import records, tables

_BLOCK = re.compile(
    r"(<!-- (table|source): ([\w/]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL
)


def documents() -> list[Path]:
    places = "*.md", "docs/**/*.md", "examples/*/*.md"
    return [path for place in places for path in sorted(records.ROOT.glob(place))]


def render(text: str, load: Callable[[str], Any] = records.load) -> str:
    """A document with its blocks written anew.

    Raises:
      ValueError: a mark names no table.
    """

    def block(match: re.Match[str]) -> str:
        mark, kind, name, _, end = match.groups()
        made = provenance(name) if kind == "source" else tables.made(name, load)
        return f"{mark}{made}\n{end}"

    return _BLOCK.sub(block, text)


def provenance(name: str) -> str:
    """Machines, versions, dates and commits of a result."""
    record = json.loads((records.RESULTS / f"{name}.json").read_text())
    at = record["machine"]
    usual = [at | {"dates": [at["date"]], "commits": [at["commit"]]}]
    made = "; ".join(map(_origin, record.get("runs") or usual))
    gaps = record.get("missing", ())
    more = f" and {len(gaps) - 3} more" if len(gaps) > 3 else ""
    note = f"; **not complete**: {'; '.join(gaps[:3])}{more}" if gaps else ""
    return f"`results/{name}.json`: {made}{note}"


def _origin(at: dict[str, Any]) -> str:
    where = f"{at['cores']} cores" if at["device"] == "cpu" else at["device"]
    dates = " to ".join(dict.fromkeys((min(at["dates"]), max(at["dates"]))))
    first, *others = at["commits"]
    commits = f"commits {first} to {others[-1]}" if others else f"commit {first}"
    return (
        f"{where} ({at['cpu']}), jax {at['jax']}, optax {at['optax']}, {dates},"
        f" {commits}"
    )


def outdated() -> dict[Path, str]:
    """Documents that differ from the records, and what they should say."""
    texts = {path: path.read_text() for path in documents()}
    made = {path: render(text) for path, text in texts.items()}
    return {path: made[path] for path in texts if made[path] != texts[path]}


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, found = parser.parse_args().check, outdated()
    for path, text in found.items():
        print(f"{path.relative_to(records.ROOT)} differs from the records")
        if not check:
            path.write_text(text)
    raise SystemExit(check and bool(found))


if __name__ == "__main__":
    main()
