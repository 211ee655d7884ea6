# SPDX-License-Identifier: Apache-2.0
"""Loss over bytes of weights, gradients and state: which methods are on the frontier?

From the record of `pretraining.py`, so that nothing is trained: of each row whose grid
and seeds are complete the bytes of a step's weights, gradients and optimizer state, two
an entry as there (one where a state has eight bits), and its losses. Gradients are
those of all that is trained; where a method takes them never formed, a second entry has
coordinates in place of the matrices' gradients.

An entry is on the frontier if none with at most its bytes has a smaller mean loss. A
method is level with AdamW unless the 95 % interval of its losses less AdamW's, seed by
seed, lies above zero. "At most GaLore's state" is beside the GaLore whose moments have
the same bits, up to a thousandth: Fira keeps one number a matrix more.

    python -m benchmarks.training.frontier [--model 1m]    # draws it, too
"""

import functools
import statistics
from typing import Any

import jax

import galore_optax
from benchmarks.lib import records
from benchmarks.lib.paired import difference
from benchmarks.training import draw_frontier, frontier_tables
from benchmarks.training.pretraining_plan import (
    BUDGETS,
    CONTROL,
    METHODS,
    Budget,
    Point,
)
from galore_optax import memory

import adapters

Found = dict[str, Any]
BASE, GALORE, EIGHT = "AdamW", "GaLore", "8-bit "
FORMED, NEVER = "formed", "never formed"
SEEDS = 3
BY_PRODUCTS = "power", "randomized", "random"  # subspaces that need no gradient
ALIKE = 1.001  # bytes


def gradient_bytes(name: str, budget: Budget) -> dict[str, int]:
    """By the ways in which the method takes its gradients."""
    method = METHODS[name]
    run = method.run(budget, Point(name, 1 / 4, method.first[1 / 4]))
    params = _params(run.adapter, budget)
    found = {FORMED: 2 * adapters.trained_count(params)}
    if (low := _coordinates(run, params)) is not None:
        found[NEVER] = 2 * low
    return found


@functools.cache
def _params(adapter: str, budget: Budget) -> Any:
    """Initial ones of the first method that has this adapter, or none."""
    name = next(
        k for k, x in METHODS.items() if x.settings.get("adapter", "") == adapter
    )
    return METHODS[name].run(budget, Point(name, 1 / 4, 0)).program().init_params(0)


def _coordinates(run: Any, params: Any) -> int | None:
    """Entries of gradients with matrices in coordinates, `None` if they cannot be."""
    options = memory.parse_options(run.options)
    method = memory.Method(run.optimizer, tuple(options.items()))
    if not method.is_galore or options.get("subspace", "power") not in BY_PRODUCTS:
        return None
    tx = method.make()

    def low(tree: Any) -> Any:
        return galore_optax.project_gradients(tx, tree, tx.init(tree), tree)[0]

    try:
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(low, params)))
    except ValueError:  # it needs whole gradients
        return None


def entries(rows: Found, budget: Budget) -> list[Found]:
    """Of each complete row one for each way of its gradients; fewest bytes first."""
    whole = [name for name, row in rows.items() if is_complete(row) and name != CONTROL]
    found = [
        _entry(name, way, size, rows)
        for name in whole
        for way, size in gradient_bytes(name, budget).items()
    ]
    found.sort(key=lambda x: (x["total"], x["loss"]))
    least = float("inf")
    for entry in found:
        entry["frontier"] = entry["loss"] < least
        least = min(least, entry["loss"])
    return found


def is_complete(row: Found) -> bool:
    return row["tuned"] and len(row["losses"]) == SEEDS


def _entry(name: str, way: str, gradients: int, rows: Found) -> Found:
    row = rows[name]
    sizes = row["bf16_bytes"] | {"gradients": gradients}
    sizes.pop("total")
    galore = rows[EIGHT + GALORE if name.startswith(EIGHT) else GALORE]
    least = ALIKE * galore["bf16_bytes"]["states"]
    less = difference(row["losses"], rows[BASE]["losses"]) if name != BASE else None
    return {
        "name": name,
        "way": way,
        "bytes": sizes,
        "total": sum(sizes.values()),
        "loss": statistics.mean(row["losses"]),
        "losses": row["losses"],
        "less_base": less and less.record(),
        "level": less is None or less.low <= 0,
        "small": row["bf16_bytes"]["states"] <= least,
        "family": memory.Method(METHODS[name].settings["optimizer"]).is_galore,
    }


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--model", default="1m", choices=BUDGETS)
    model = parser.parse_args().model
    rows = records.load(f"training/pretraining_{model}")["rows"]
    left = [name for name, row in rows.items() if not is_complete(row)]
    left += [name for name in METHODS if name not in rows]
    found = {"base": BASE, "entries": entries(rows, BUDGETS[model])}
    found["left"] = left
    records.write(f"training/frontier_{model}", found)
    print(
        frontier_tables.frontier(found),
        frontier_tables.frontier_answer(found),
        sep="\n",
    )
    draw_frontier.frontier(found, model)


if __name__ == "__main__":
    main()
