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
    others = [x for x in found["entries"] if x["name"] != found["base"]]
    small = [x for x in others if x["small"] and x["level"]]
    level = {x["name"]: f"{x['name']} ({_mean(x)})" for x in small}
    family = {level[x["name"]]: None for x in small if x["family"]}
    best = [shown(entry) for entry in found["entries"] if entry["frontier"]]
    said = f"**{'Yes' if small else 'No'}**: with at most the state of the GaLore whose"
    said += " moments have as many bits, these have a loss that three seeds do not tell"
    said += f" from {found['base']}'s (in parentheses the mean less its): "
    said += f"{_list(level.values())}; of GaLore's family {_list(family)}."
    said += f" On the frontier, from the fewest bytes up: {_list(best)}."
    left = f" Not complete, and not counted: {_list(found['left'])}."
    return said + (left if found["left"] else "")


def _mean(entry: Found) -> str:
    return f"{entry['less_base']['mean']:+.4f}"


def _list(names: Iterable[str]) -> str:
    return "; ".join(names) or "none"
