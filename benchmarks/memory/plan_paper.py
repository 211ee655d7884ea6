# SPDX-License-Identifier: Apache-2.0
"""How far the memory that the GaLore paper prints lies from its own formula.

python -m benchmarks.memory.plan_paper

The paper: mn weights, mr + 2nr states of a projected matrix and two states of every
other parameter, in bf16. Table 2 gives weights and states together, Table 6 apart.
"""

from typing import Any

from benchmarks.lib import records
from benchmarks.memory import tables
from galore_optax import memory
from galore_optax.memory import Method

# model: rank; Table 2, totals of Adam and GaLore; Table 6, weights, states of both; GB.
PAPER = {
    "60m": (128, 0.36, 0.24, 0.12, 0.23, 0.13),
    "130m": (256, 0.76, 0.52, 0.25, 0.51, 0.28),
    "350m": (256, 2.06, 1.22, 0.68, 1.37, 0.54),
    "1b": (512, 7.80, 4.38, 2.60, 5.20, 1.78),
}
# Section 5.3, Table 3: 8-bit states.
PAPER_7B = {"rank": 1024, "galore_8bit": 18.0, "adam_8bit": 26.0}


def bf16_galore(rank: int) -> Method:
    return Method("galore_adam", (("rank", rank), ("moment_dtype", "bfloat16")))


def weights_and_state(model: str, method: Method) -> tuple[float, float]:
    plan = memory.plan(model, method)
    return plan.weights / 1e9, plan.state.total / 1e9


def row(model: str) -> dict[str, Any]:
    rank, adam, galore, weights, adam_state, galore_state = PAPER[model]
    ours, adam_ours = weights_and_state(model, Method("adam"))
    _, galore_ours = weights_and_state(model, bf16_galore(rank))
    pairs = {
        "weights": (weights, ours),
        "adam_state": (adam_state, adam_ours),
        "adam_total": (adam, ours + adam_ours),
        "galore_state": (galore_state, galore_ours),
        "galore_total": (galore, ours + galore_ours),
    }
    return {"model": model, "rank": rank} | {k: cell(*v) for k, v in pairs.items()}


def cell(paper: float, formula: float) -> dict[str, float]:
    return {"paper": paper, "formula": formula, "relative": paper / formula - 1}


def seven_billion() -> dict[str, Any]:
    """The formula with one byte for every moment, as the paper counts."""
    method = bf16_galore(PAPER_7B["rank"])
    weights, adam = weights_and_state("7b", Method("adam"))
    state = memory.plan("7b", method).state
    halved = (state.first_moments + state.second_moments) / 2
    totals = {
        "one byte a moment, projectors in bf16": weights
        + (halved + state.projectors) / 1e9,
        "one byte for all states": weights + state.total / 2e9,
    }
    coded = Method("galore_adamw8bit", (("rank", PAPER_7B["rank"]),))
    totals["galore_optax, galore_adamw8bit"] = sum(weights_and_state("7b", coded))
    galore = {name: cell(PAPER_7B["galore_8bit"], x) for name, x in totals.items()}
    adam_total = cell(PAPER_7B["adam_8bit"], weights + adam / 2)
    return {"galore_total": galore, "adam_total": adam_total}


def main() -> None:
    found = {"models": [row(model) for model in PAPER], "7b_8bit": seven_billion()}
    print(tables.plan_paper(found))
    records.write("memory/plan_paper", found)


if __name__ == "__main__":
    main()
