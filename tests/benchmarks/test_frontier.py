# SPDX-License-Identifier: Apache-2.0
"""Which methods are called the frontier, and what is told of them."""

import itertools
from typing import Any

import jax.numpy as jnp
import pytest

from benchmarks.training import frontier, frontier_tables
from benchmarks.training.pretraining_plan import BUDGETS

BUDGET = BUDGETS["1m"]


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pair of matrices of 64 by 96, and an embedding."""
    kernel, embedding = jnp.zeros((2, 64, 96)), jnp.zeros((10, 4))
    params = {"layers": {"up": {"kernel": kernel}}, "embedding": embedding}
    monkeypatch.setattr(frontier, "_params", lambda *_: params)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("name", ["AdamW", "GaLore", "Muon in the subspace", "Fira"])
def test_gradients_are_those_of_what_is_trained(name: str) -> None:
    expected = {"formed": 2 * (2 * 64 * 96 + 40)}
    if name not in ("AdamW", "Fira"):  # Fira takes what is outside of the subspace
        expected["never formed"] = 2 * (2 * BUDGET.rank * 96 + 40)
    assert frontier.gradient_bytes(name, BUDGET) == expected


def row(states: int, *losses: float, tuned: bool = True) -> dict[str, Any]:
    sizes = {"weights": 100, "states": states, "total": 100 + states}
    kept = {"losses": list(losses), "diverged": 0, "tuned": tuned}
    return kept | {"bf16_bytes": sizes}


ROWS = {
    "AdamW": row(200, 4.0, 4.1, 4.2),
    "8-bit AdamW": row(100, 4.01, 4.1, 4.2),
    "GaLore": row(120, 4.5, 4.6, 4.7),
    "8-bit GaLore": row(60, 4.5, 4.6, 4.71),
    "Fira": row(120, 3.9, 4.0, 4.1),
    "Muon": row(150, 4.0, 4.1, 4.2, tuned=False),
    "APOLLO": row(110, 3.0, 3.0),
    "Adafactor": row(119, 4.0, 4.1, 4.25),
}


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    def ways(name: str, budget: Any) -> dict[str, int]:
        del budget
        low = {"never formed": 40} if "GaLore" in name else {}
        return {"formed": 100} | low

    monkeypatch.setattr(frontier, "gradient_bytes", ways)
    entries = frontier.entries(ROWS, BUDGET)
    return {"base": "AdamW", "entries": entries, "left": ["Muon", "APOLLO"]}


def test_nothing_with_as_few_bytes_beats_the_frontier(found: dict[str, Any]) -> None:
    entries = found["entries"]
    names = {entry["name"] for entry in entries}
    assert names == set(ROWS) - {"Muon", "APOLLO"}  # whose runs are not complete
    for one in entries:
        beaten = any(
            other["total"] <= one["total"] and other["loss"] < one["loss"]
            for other in entries
        )
        assert one["frontier"] == (not beaten)
    totals = [entry["total"] for entry in entries]
    assert all(a <= b for a, b in itertools.pairwise(totals))
    assert totals[0] == 100 + 60 + 40  # 8-bit GaLore, never formed


def test_the_answer_compares_states_of_the_same_bits(found: dict[str, Any]) -> None:
    """8-bit AdamW has less state than GaLore, and more than 8-bit GaLore."""
    by_name = {entry["name"]: entry for entry in found["entries"]}
    assert by_name["8-bit AdamW"]["level"]
    assert not by_name["8-bit AdamW"]["small"]
    assert by_name["Fira"]["less_base"]["high"] < 0
    assert not by_name["GaLore"]["level"]
    answer = frontier_tables.frontier_answer(found)
    assert answer.startswith("**Yes**")
    assert "its): Adafactor (+0.0167); Fira (-0.1000); of" in answer
    assert "of GaLore's family Fira (-0.1000)." in answer
    assert "Not complete, and not counted: Muon; APOLLO." in answer
    shown = frontier_tables.frontier(found)
    assert "| **8-bit GaLore, gradients never formed** | 0.00 |" in shown
    alone = [
        entry for entry in found["entries"] if entry["name"] in ("AdamW", "GaLore")
    ]
    answer = frontier_tables.frontier_answer(found | {"entries": alone, "left": []})
    assert answer.startswith("**No**")
    assert "its): none; of GaLore's family none." in answer
    assert "not counted" not in answer
