# SPDX-License-Identifier: Apache-2.0
"""The benchmark of fine-tuning, without training."""

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.lib import records
from benchmarks.training import finetuning, tables
from benchmarks.training.finetuning import LADDER, Choice, Table, search


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> records.Runs:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "machine", dict)
    return records.Runs("training/finetuning")


def loss(rate: float, best: float) -> float:
    return abs(math.log(rate / best)) + 0.1


@pytest.mark.parametrize("best", LADDER)
@pytest.mark.parametrize("start", [2e-5, 2e-4, 5e-3])
def test_search_ends_at_the_least_loss_with_neighbours_tried(
    best: float, start: float
) -> None:
    found, losses = search(start, lambda rate: loss(rate, best))
    assert found == best
    at = LADDER.index(best)
    for neighbour in LADDER[max(at - 1, 0) : at + 2]:
        assert f"{neighbour:g}" in losses


def test_search_takes_no_diverged_run_and_stops_without_one() -> None:
    assert search(1e-4, lambda r: math.nan if r > 1e-4 else 1.0 - r)[0] == 1e-4
    found, losses = search(1e-4, lambda r: None if r > 1e-4 else 1.0)
    assert found is None
    assert losses == {"5e-05": 1.0, "0.0001": 1.0}


def fake(choice: Choice) -> dict[str, Any]:
    """A run whose loss is least at a rate of its method, and one of NaN."""
    best = {"full": 5e-5, "galore": 5e-4, "lora": 1e-3}[choice.method]
    return {
        "dev_metric": 0.5 + choice.seed / 100 + choice.rank / 1000,
        "dev_loss": 1.0,
        "validation_metric": 0.5,
        "validation_loss": loss(choice.rate, best),
        "steps": 10,
        "trained": 100,
        "state_bytes": 800,
        "seconds_per_step": 0.1,
        "records": [],
    }


def filled(runs: Any, make: Any = fake, **options: Any) -> Table:
    table = Table(runs, "minilm", make, **options)
    table.run(3)
    return table


def test_every_row_runs_over_seeds_at_its_rate(runs: records.Runs) -> None:
    table = filled(runs)
    result = table.result()
    assert not table.missing
    best = {"full": 5e-5, "galore": 5e-4, "lora": 1e-3}
    assert result["learning_rates"] == best
    assert list(result["rows"]) == list(finetuning.ROWS)
    cell = result["rows"]["GaLore, rank 8"]["rte"]
    assert cell["dev_metric"] == pytest.approx([0.508, 0.518, 0.528])
    assert len(result["rows"]["AdamW"]["sst2"]["dev_metric"]) == 1
    at_8 = [key for key in runs.found if "rank 8" in key]
    assert {key.split(", ")[3] for key in at_8} == {"lr 0.0005", "lr 0.001"}
    # Three rates a grid, and those on the way to a best one that was first; 5 rows of 3
    # seeds less the 3 of the grid; 2 x 5 once.
    tried = sum(map(len, result["grid_validation_loss"].values()))
    assert tried == 4 + 4 + 3
    assert len(runs.found) == (tried - 3) + 2 * 15 + 10


def test_what_is_on_record_is_not_run_again(runs: records.Runs) -> None:
    first = filled(runs).result()
    again = filled(
        records.Runs("training/finetuning"), make=lambda _: pytest.fail("ran again")
    )
    assert again.result() == first
    late = filled(records.Runs("training/finetuning"), minutes=0)
    assert late.result() == first


def test_what_was_not_run_is_listed_with_its_reason(runs: records.Runs) -> None:
    table = filled(runs, make=lambda _: pytest.fail("ran"), minutes=0)
    assert "minilm, cola, full, lr 5e-05, 2 epochs, seed 0: no time left" in (
        table.missing
    )
    assert "rte, LoRA, rank 8, seed 2: no learning rate yet" in table.missing
    assert table.result()["rows"] == {}
    only = filled(runs, wanted=lambda t: finetuning.refusal(t, ["rte"], Path("glue")))
    reasons = {text.rsplit(": ", 1)[1] for text in only.missing}
    assert reasons == {"not among --tasks", "no learning rate yet"}
    only = filled(runs, wanted=lambda t: finetuning.refusal(t, ["cola"], Path("glue")))
    assert {text.rsplit(": ", 1)[1] for text in only.missing} == {"not among --tasks"}
    assert {task for row in only.cells.values() for task in row} == {"cola"}


def test_a_run_of_another_process_is_left_to_it(runs: records.Runs) -> None:
    def made(choice: Choice) -> dict[str, Any]:
        if choice.key.startswith("minilm, sst2, galore rank 8"):
            other = filled(records.Runs("training/finetuning"))
            assert other.missing == [f"{choice.key}: another process makes it"]
        return fake(choice)

    table = filled(runs, make=made)
    assert not table.missing
    assert len(table.result()["rows"]["GaLore, rank 8"]["sst2"]["dev_metric"]) == 1


def test_an_interrupted_series_goes_on(runs: records.Runs) -> None:
    made: list[str] = []

    def stops(choice: Choice) -> dict[str, Any]:
        if len(made) == 7:
            raise KeyboardInterrupt
        made.append(choice.key)
        return fake(choice)

    with pytest.raises(KeyboardInterrupt):
        filled(runs, make=stops)
    later = records.Runs("training/finetuning")
    assert list(later.found) == made
    assert filled(later).result() == filled(runs).result()


def test_tasks_without_files_are_refused() -> None:
    assert finetuning.refusal("cola", ["cola"], None) == "--glue-dir was not given"
    assert finetuning.refusal("reviews", ["reviews"], None) == ""
    assert finetuning.refusal("cola", ["cola"], Path("glue")) == ""
    assert finetuning.refusal("rte", ["cola"], Path("glue")) == "not among --tasks"


def test_choices_have_names_of_their_own_and_recipes(tmp_path: Path) -> None:
    choice = Choice("rte", "galore", 8, 2e-4, 1, 2, "minilm")
    assert choice.key == (
        "minilm, rte, galore rank 8, lr 0.0002, 2 epochs, tokens 64, seed 1"
    )
    recipe = choice.recipe(Path("glue"), tmp_path)
    assert (recipe.rank, recipe.learning_rate, recipe.seed) == (8, 2e-4, 1)
    assert (recipe.epochs, recipe.alpha / recipe.rank) == (2, 2)
    assert (recipe.longest, recipe.steps_an_epoch(1000)) == (64, 1000 // 16)
    film = Choice("sst2", "full", 4, 1e-4, 0, 1, "minilm").recipe(None, tmp_path)
    assert film.steps_an_epoch(60_000) == 500


def test_the_table_has_a_row_a_method(runs: records.Runs) -> None:
    shown = tables.finetuning(filled(runs).result(), {"over_adamw": {}}).splitlines()
    assert shown[2].startswith("| AdamW | 51.40 ± 1.00 | 51.40 ± 1.00 | 50.40 |")
    assert len(shown) == 2 + len(finetuning.ROWS)


@pytest.mark.slow
def test_speed_is_measured_side_by_side() -> None:
    from benchmarks.training import finetuning_speed

    from encoder import Config

    tiny = Config(
        vocab=50, width=16, hidden=24, layers=2, heads=2, positions=16, norm_eps=1e-12
    )
    found = finetuning_speed.compare(tiny, rows=2, tokens=8, rounds=2)
    assert found["over_adamw"]["AdamW"] == 1
    assert set(found["over_adamw"]) == set(finetuning.ROWS)
    steady, refresh = (
        found["seconds"][f"GaLore, rank 8{x}"] for x in ("", finetuning_speed.REFRESH)
    )
    expected = (32 * steady + refresh) / 33
    assert found["on_average"]["GaLore, rank 8"] == pytest.approx(expected)
