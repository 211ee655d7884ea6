# SPDX-License-Identifier: Apache-2.0
"""Parts of tables: rows in Markdown, quantities in words, where a result is from."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.lib import common

Load = Callable[[str], Any]  # the result on record under a name


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def provenance(name: str) -> str:
    """Machines, versions, dates and commits of a result."""
    path = common.RESULTS / f"{name}.json"
    record = json.loads(path.read_text())
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


def signed(share: float, digits: int = 1) -> str:
    """A relative difference in per cent, with a true minus."""
    return f"{100 * share:+.{digits}f} %".replace("-", "−")


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
