# SPDX-License-Identifier: Apache-2.0
"""No number in README or docs without a result behind it."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib import cells, claims, common, report, tables
from benchmarks.training import training_tables


@pytest.mark.parametrize("name", report.DOCUMENTS)
def test_every_number_comes_from_a_result(name: str) -> None:
    assert report.problems(name, (report.ROOT / name).read_text()) == []


def test_all_documents_are_looked_at() -> None:
    found = {str(p.relative_to(report.ROOT)) for p in report.ROOT.glob("docs/*.md")}
    assert found < set(report.DOCUMENTS)
    assert {claim.path for claim in claims.CLAIMS} <= set(report.DOCUMENTS)


@pytest.mark.parametrize(
    "text",
    [
        "It is 3.7 times faster.",
        "It takes 12 GB.",
        "It takes 1,234 of them.",
        "It saves 40 % of them.",
        "It is 15x faster, or 15 times.",
        "A loss of −0.5 there.",
    ],
)
def test_a_bare_number_is_found(text: str) -> None:
    assert report.uncovered("README.md", text)


@pytest.mark.parametrize(
    "text",
    [
        "Seven layers of rank 64, at step 200 on 2 cores.",
        "Code: `lr=0.01`, and\n\n    an indented 1.5 GB\n\nblock.",
        "<!-- table: demo -->\n| 1.5 GB |\n<!-- end -->\n",
        "See [this](https://example.org/2.5/3.5).",
    ],
)
def test_what_is_no_measurement_is_left_alone(text: str) -> None:
    assert report.uncovered("README.md", text) == []


def test_a_claim_has_to_stand_as_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = claims.Claim("a.md", "It is {:.1f} times", lambda load: [load("speed")])
    monkeypatch.setattr(claims, "CLAIMS", [claim])

    def load(name: str) -> float:
        return {"speed": 2.04}[name]

    good, bad = "It is\n**2.0 times** faster.", "It is 2.1 times faster."
    assert report.unfounded("a.md", good, load) == []
    assert report.uncovered("a.md", good, load) == []
    assert report.unfounded("a.md", bad, load) == ["It is 2.0 times"]
    assert len(report.uncovered("a.md", bad, load)) == 1


def test_a_table_is_written_between_its_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.TABLES, "one", lambda load: f"| {load('x')} |")
    text = "a\n<!-- table: one -->\nold\n<!-- end -->\nb"
    expected = "a\n<!-- table: one -->\n| 7 |\n<!-- end -->\nb"
    assert report.render(text, lambda name: 7) == expected
    assert report.render(expected, lambda name: 7) == expected
    with pytest.raises(ValueError, match=r"no table is called .two.; known: .*one"):
        report.render(text.replace("one", "two"))


def test_tables_of_training_leave_open_what_is_not_there() -> None:
    cell = {"dev_metric": [0.5, 0.7], "state_bytes": 1234, "trained": 5678}
    once = cell | {"dev_metric": [0.25]}
    rows = {"AdamW": {"cola": cell, "sst2": once}}
    results = {"training/finetuning": {"rows": rows}}
    results["training/finetuning_speed"] = {"over_adamw": {"AdamW": 1.0}}
    found = training_tables.finetuning(results.__getitem__)
    assert found.splitlines()[2:] == [
        "| AdamW | 60.00 ± 14.14 |  | 25.00 |  | 1,234 | 5,678 | 1.00 |"
    ]
    assert len(training_tables.finetuning_pairs(results.__getitem__).splitlines()) == 2
    better = {"cola": cell | {"dev_metric": [0.51, 0.7101]}}
    results["training/finetuning"]["rows"] = rows | {"LoRA, rank 4": better}
    pairs = training_tables.finetuning_pairs(results.__getitem__).splitlines()
    # Differences of 1 and 1.01; t(0.975, 1) = 12.7062.
    wanted = "+1.00 | +0.94 to +1.07 | yes"
    assert pairs[2:] == [f"| LoRA, rank 4, CoLA, Matthews | {wanted} |"]
    fast = {"tokens_per_second": 1234.5}
    speed = {"methods": {"LoRA": fast, "fixed": fast}}
    row = {
        "perplexities": [10.0],
        "diverged": 0,
        "bf16_bytes": {"weights": 1e6, "states": 2.5e6},
        "learning_rate": 0.01,
        "ratio": 0.25,
    }
    results = {
        "training/pretraining_speed_1m": speed,
        "training/pretraining_1m": {
            "control": "fixed",
            "rows": {"LoRA": row, "fixed": row | {"diverged": 1}},
        },
    }
    made = training_tables.pretraining(results.__getitem__)
    numbers = "10.00 | 1.00 | 2.50 | 1,234 | 0.01"
    assert made.splitlines()[2:] == [
        f"| LoRA | {numbers} | 0.25 |",
        f"| fixed | {numbers.replace(' |', ' (1 diverged) |', 1)} | 0 |",
    ]


def test_methods_are_compared_with_galore_seed_by_seed() -> None:
    losses = {"AdamW": [4.1, 4.3], "GaLore": [4.2, 4.4001], "LoRA": [4.2]}
    rows = {name: {"losses": found} for name, found in losses.items()}
    found = training_tables.pretraining_galore(lambda name: {"rows": rows})
    # Differences of -0.1 and -0.1001; t(0.975, 1) = 12.7062. One of LoRA's diverged.
    assert found.splitlines()[2:] == ["| AdamW | -0.1001 | -0.1007 to -0.0994 | yes |"]


def test_a_setting_is_named_with_what_it_changes() -> None:
    less = {"mean": 0.01, "low": -0.005, "high": 0.025, "beyond_seeds": False}
    row = {"name": "svd", "mean": 4.5, "less_base": less}
    studies = {"rank and gap": [row], "subspace": [row, row]}
    result = {"studies": studies, "grid": "rank and gap"}
    found = training_tables.ablations(lambda name: result)
    assert found.splitlines()[2:] == [
        "| subspace: svd | 4.5000 | +0.0100 | -0.0050 to +0.0250 | no |"
    ]


def test_a_partial_result_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "machine", lambda: MACHINE)
    common.write("x", 1, missing=["no GPU"])
    found = json.loads((tmp_path / "x.json").read_text())
    assert (found["complete"], found["missing"]) == (False, ["no GPU"])
    assert cells.provenance("x").endswith("; **not complete**: no GPU")
    common.write("x", 1)
    assert "not complete" not in cells.provenance("x")


def test_a_table_names_where_its_runs_were_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    days = "2026-01-03", "2026-01-01", "2026-01-02"
    for number, (day, cpu) in enumerate(zip(days, "aab", strict=True)):
        made = MACHINE | {"date": day, "cpu": cpu, "commit": f"{number}{number}"}
        monkeypatch.setattr(common, "machine", lambda made=made: made)
        common.Runs("x").get(day, lambda: {"loss": 1})
    common.write("y", 1, runs=common.Runs("x"))
    one, two = (
        "jax 1, optax 2, 2026-01-01 to 2026-01-03, commits 00 to 11",
        "2026-01-02",
    )
    assert cells.provenance("y") == (
        f"`results/y.json`: 2 cores (a), {one}; 2 cores (b), jax 1, optax 2, {two},"
        " commit 22"
    )


def test_runs_are_kept_one_by_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "machine", lambda: MACHINE)

    def fails() -> dict[str, Any]:
        raise RuntimeError

    assert common.Runs("x").get("a", lambda: {"loss": 1}) == {
        "loss": 1,
        "machine": MACHINE,
    }
    runs = common.Runs("x")
    assert runs.get("a", fails)["loss"] == 1
    with pytest.raises(RuntimeError):
        runs.get("b", fails)
    assert set(common.Runs("x").found) == {"a"}


def test_processes_share_the_runs_of_a_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(common, "machine", lambda: MACHINE)
    one, two = common.Runs("x"), common.Runs("x")

    def slow() -> dict[str, Any]:
        assert two.made_elsewhere("a")
        assert not two.made_elsewhere("b")
        two.get("b", lambda: {"loss": 2})
        return {"loss": 1}

    one.get("a", slow)
    assert not two.made_elsewhere("a")
    assert two.get("a", lambda: pytest.fail("made twice"))["loss"] == 1
    assert set(common.Runs("x").found) == {"a", "b"}


MACHINE = {
    **{"cores": 2, "device": "cpu", "cpu": "c", "jax": "1", "optax": "2"},
    **{"date": "2026-01-01", "commit": "abc"},
}
