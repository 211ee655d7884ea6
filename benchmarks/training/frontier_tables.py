# SPDX-License-Identifier: Apache-2.0
"""The table of `frontier.py`, and the answer that it gives."""

from collections.abc import Iterable
from typing import Any

from benchmarks.lib.tables import INTERVAL, less, of, table

Found = dict[str, Any]


@of("training/frontier_1m")
def frontier(found: Found) -> str:
    """From the fewest bytes up."""
    base = found["base"]
    rows = [
        (
            f"**{shown(entry)}**" if entry["frontier"] else shown(entry),
            *(
                f"{entry['bytes'][x] / 1e6:.2f}"
                for x in ("weights", "gradients", "states")
            ),
            f"{entry['total'] / 1e6:.2f}",
            f"{entry['loss']:.4f}",
            *(less(entry["less_base"]) if entry["less_base"] else ("", "", "")),
        )
        for entry in found["entries"]
    ]
    head = "weights, MB", "gradients, MB", "state, MB", "together", "loss"
    return table(("on the frontier in bold", *head, f"less {base}'s", *INTERVAL), rows)


def shown(entry: Found) -> str:
    """The name, and the way if gradients are not formed."""
    way = "" if entry["way"] == "formed" else f", gradients {entry['way']}"
    return f"{entry['name']}{way}"


@of("training/frontier_1m")
def frontier_answer(found: Found) -> str:
    """Whether the gap is closed, and by what."""
    small = {x["name"]: x for x in found["entries"] if x["small"] and x["level"]}
    family = [name for name, entry in small.items() if entry["family"]]
    best = [shown(entry) for entry in found["entries"] if entry["frontier"]]
    said = f"**{'Yes' if small else 'No'}**: {_list(small)}"
    said += (
        f" has a loss within seeds of {found['base']}'s with at most the state of the"
    )
    said += (
        f" GaLore whose moments have as many bits; of GaLore's family {_list(family)}."
    )
    said += f" On the frontier, from the fewest bytes up: {_list(best)}."
    left = f" Not complete, and not counted: {_list(found['left'])}."
    return said + (left if found["left"] else "")


def _list(names: Iterable[str]) -> str:
    return "; ".join(names) or "none"
