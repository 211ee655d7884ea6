# SPDX-License-Identifier: Apache-2.0
"""Documents hold what is on record; records hold where they come from."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib import records, report, tables
from benchmarks.training import tables as training


def test_documents_say_what_is_on_record() -> None:
    assert {str(path) for path in report.outdated()} == set()


def test_all_documents_are_looked_at() -> None:
    names = {str(path.relative_to(records.ROOT)) for path in report.documents()}
    assert {"README.md", "docs/results.md", "examples/llama/README.md"} <= names


def test_every_table_stands_in_a_document() -> None:
    texts = "".join(path.read_text() for path in report.documents())
    missing = {x for x in tables.TABLES if f"<!-- table: {x} -->" not in texts}
    assert missing == {"never_formed_crossing"}  # not recorded yet


def test_a_table_is_written_between_its_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.TABLES, "one", (("x",), lambda x: f"| {x} |"))
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
    speed = {"over_adamw": {"AdamW": 1.0}}
    found = training.finetuning({"rows": rows}, speed)
    assert found.splitlines()[2:] == [
        "| AdamW | 60.00 ± 14.14 |  | 25.00 |  | 1,234 | 5,678 | 1.00 |"
    ]
    assert len(training.finetuning_pairs({"rows": rows}).splitlines()) == 2
    better = {"cola": cell | {"dev_metric": [0.51, 0.7101]}}
    rows |= {"LoRA, rank 4": better}
    pairs = training.finetuning_pairs({"rows": rows}).splitlines()
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
    rows = {"LoRA": row, "fixed": row | {"diverged": 1}}
    made = training.pretraining({"control": "fixed", "rows": rows}, speed)
    numbers = "10.00 | 1.00 | 2.50 | 1,234 | 0.01"
    assert made.splitlines()[2:] == [
        f"| LoRA | {numbers} | 0.25 |",
        f"| fixed | {numbers.replace(' |', ' (1 diverged) |', 1)} | 0 |",
    ]


def test_methods_are_compared_with_galore_seed_by_seed() -> None:
    losses = {"AdamW": [4.1, 4.3], "GaLore": [4.2, 4.4001], "LoRA": [4.2]}
    rows = {name: {"losses": found} for name, found in losses.items()}
    found = training.pretraining_galore({"rows": rows})
    # Differences of -0.1 and -0.1001; t(0.975, 1) = 12.7062. One of LoRA's diverged.
    assert found.splitlines()[2:] == ["| AdamW | -0.1001 | -0.1007 to -0.0994 | yes |"]


def test_a_setting_is_named_with_what_it_changes() -> None:
    less = {"mean": 0.01, "low": -0.005, "high": 0.025, "beyond_seeds": False}
    row = {"name": "svd", "mean": 4.5, "less_base": less}
    studies = {"rank and gap": [row], "subspace": [row, row]}
    result = {"studies": studies, "grid": "rank and gap"}
    found = training.ablations(result)
    assert found.splitlines()[2:] == [
        "| subspace: svd | 4.5000 | +0.0100 | -0.0050 to +0.0250 | no |"
    ]


def test_a_partial_result_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "ROOT", tmp_path)
    monkeypatch.setattr(records, "machine", lambda: MACHINE)
    records.write("x", 1, missing=["no GPU"])
    found = json.loads((tmp_path / "x.json").read_text())
    assert (found["complete"], found["missing"]) == (False, ["no GPU"])
    assert report.provenance("x").endswith("; **not complete**: no GPU")
    records.write("x", 1)
    assert "not complete" not in report.provenance("x")


def test_a_table_names_where_its_runs_were_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "ROOT", tmp_path)
    days = "2026-01-03", "2026-01-01", "2026-01-02"
    for number, (day, cpu) in enumerate(zip(days, "aab", strict=True)):
        made = MACHINE | {"date": day, "cpu": cpu, "commit": f"{number}{number}"}
        monkeypatch.setattr(records, "machine", lambda made=made: made)
        records.Runs("x").get(day, lambda: {"loss": 1})
    records.write("y", 1, runs=records.Runs("x"))
    one, two = (
        "jax 1, optax 2, 2026-01-01 to 2026-01-03, commits 00 to 11",
        "2026-01-02",
    )
    assert report.provenance("y") == (
        f"`results/y.json`: 2 cores (a), {one}; 2 cores (b), jax 1, optax 2, {two},"
        " commit 22"
    )


def test_runs_are_kept_one_by_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "machine", lambda: MACHINE)

    def fails() -> dict[str, Any]:
        raise RuntimeError

    assert records.Runs("x").get("a", lambda: {"loss": 1}) == {
        "loss": 1,
        "machine": MACHINE,
    }
    runs = records.Runs("x")
    assert runs.get("a", fails)["loss"] == 1
    with pytest.raises(RuntimeError):
        runs.get("b", fails)
    assert set(records.Runs("x").found) == {"a"}


def test_processes_share_the_runs_of_a_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "machine", lambda: MACHINE)
    one, two = records.Runs("x"), records.Runs("x")

    def slow() -> dict[str, Any]:
        assert two.made_elsewhere("a")
        assert not two.made_elsewhere("b")
        two.get("b", lambda: {"loss": 2})
        return {"loss": 1}

    one.get("a", slow)
    assert not two.made_elsewhere("a")
    assert two.get("a", lambda: pytest.fail("made twice"))["loss"] == 1
    assert set(records.Runs("x").found) == {"a", "b"}


MACHINE = {
    **{"cores": 2, "device": "cpu", "cpu": "c", "jax": "1", "optax": "2"},
    **{"date": "2026-01-01", "commit": "abc"},
}


def test_a_plan_is_filled_in_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "machine", lambda: MACHINE)
    made: list[str] = []

    def make(name: str) -> dict[str, Any]:
        made.append(name)
        return {"loss": 1}

    plan = {name: lambda name=name: make(name) for name in "abc"}
    assert records.Runs("x").fill({"a": plan["a"]}, 1.0) == []
    left = ["b: still to be run", "c: still to be run"]
    assert records.Runs("x").fill(plan, 0.0) == left
    assert made == ["a"]
    assert records.Runs("x").fill(plan, 1.0) == []
    assert made == ["a", "b", "c"]
    records.show_list(records.Runs("x"), plan | {"d": None})
    out = capsys.readouterr().out
    assert (out.count("on record"), out.count("to be run")) == (3, 1)


def test_a_quick_run_leaves_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    records.write("some", {}, quick=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="run the benchmark"):
        records.load("some")


def test_what_a_fine_tuned_model_says_is_shown_at_its_best_rate() -> None:
    runs = {
        f"{method}, {rate:g}": {
            **{"method": method, "rate": rate, "loss": loss, "before": 4.0},
            **{"sample_before": "first", "sample": f"{method} at {loss}"},
            **{"trained": 10, "state_bytes": 20},
        }
        for method, rate, loss in [
            ("galore", 1e-4, 3.7),
            ("adamw", 3e-4, 3.65),
            ("galore", 3e-4, 3.6),
            ("adamw", 1e-4, 3.5),
        ]
    }
    found = {"prompt": "Say", "runs": runs}
    assert training.finetuning_llama_samples(found).splitlines()[2:] == [
        "| before | first |",
        "| adamw, 0.0001 | adamw at 3.5 |",
        "| galore, 0.0003 | galore at 3.6 |",
    ]
    rows = training.finetuning_llama(found).splitlines()[2:]
    starts = ["AdamW | 0.0001", "AdamW | 0.0003", "GaLore | 0.0001", "GaLore | 0.0003"]
    assert [row[2 : 2 + len(x)] for row, x in zip(rows, starts, strict=True)] == starts
