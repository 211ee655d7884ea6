# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, draws and refuses."""

import sys
from pathlib import Path

import pytest

from galore_optax import memory
from galore_optax.memory import _cli

Output = pytest.CaptureFixture[str]


def run(*arguments: str) -> int:
    return _cli.main(["plan", *arguments])


def test_methods_stand_side_by_side(capsys: Output) -> None:
    code = run("60m", "--method", "adamw", "galore_adamw8bit", "--option", "rank=128")
    out = capsys.readouterr().out
    assert code == 0
    assert "adamw  galore_adamw8bit" in out
    assert "rank=128" in out
    assert "projectors" in out
    assert "not modelled" in out
    plan = memory.plan("60m", "adamw")
    assert f"{plan.total / 1e6:.2f} MB" in out


def test_moments_and_adamw_are_told_by_dtype(capsys: Output) -> None:
    assert run("60m", "--method", "galore_adamw", "--option", "rank=400") == 0
    out = capsys.readouterr().out
    assert "first moments, bf16" in out
    assert "second moments, f32" in out
    adamw = memory.plan("60m", "adamw").state.total
    assert f"state of optax.adamw: {adamw / 1e6:.2f} MB with moments in the" in out
    assert "warning: the state of galore_adamw(rank=400), " in out
    assert f"exceeds optax.adamw's, {adamw / 1e6:.2f} MB. Less takes a lower" in out


def test_a_rank_may_be_a_share(capsys: Output) -> None:
    assert run("60m", "--method", "galore_adamw", "--option", "rank=0.25") == 0
    share = capsys.readouterr().out
    assert run("60m", "--method", "galore_adamw", "--option", "rank=128") == 0
    whole = capsys.readouterr().out  # 512 wide
    assert "rank=0.25" in share
    assert share.replace("rank=0.25", "rank=128 ").split() == whole.split()
    assert run("60m", "--option", "rank=1.5") == 2


def test_nothing_is_said_of_adamw_where_it_is_what_is_planned(capsys: Output) -> None:
    assert run("60m", "--method", "adamw", "--dtype", "float32") == 0
    out = capsys.readouterr().out
    assert "optax.adamw" not in out
    assert "warning" not in out


def test_small_models_have_a_rank_below_their_width(capsys: Output) -> None:
    assert run("9m", "--option", "weight_decay=0.1") == 0  # 128 wide
    head = capsys.readouterr().out.splitlines()[2:5]
    assert "rank=32" in "".join(head)
    assert run("60m", "--option", "weight_decay=0.1") == 0
    assert "rank" not in capsys.readouterr().out.split("---")[0]


def test_flags_reach_the_setting(capsys: Output) -> None:
    flags = "--tokens 64 --batch 2 --accumulation 4 --dtype float32 --remat --layerwise"
    assert run("9m", *flags.split()) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "9m: 2 x 64 tokens, 4 micro-batches, float32, remat, layerwise"


def test_gradients_may_be_never_formed(capsys: Output) -> None:
    flags = ["--option", "rank=512", "--remat", "--gradients", "never"]
    assert run("1b", *flags) == 0
    out = capsys.readouterr().out
    assert out.startswith("1b: 1 x 256 tokens, bfloat16, remat, never formed\n")
    assert out.splitlines()[-3].split()[-2:] == ["blocks", "refresh"]
    assert "what a refresh" not in out


def test_a_budget_lists_what_fits(capsys: Output) -> None:
    assert run("130m", "--budget", "1GB", "--no-layerwise") == 0
    out = capsys.readouterr().out
    assert "1GB: 1.00 GB for this process. JAX takes 75% of a GPU" in out
    assert "layerwise" not in out
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in out
    head, choices = out.split("what fits")
    assert "adamw  adamw8bit  adafactor  galore_adamw" in head
    assert "\nadafactor " in choices


def test_a_budget_may_be_a_card(capsys: Output) -> None:
    arguments = "7b --method galore_adamw --option rank=1024 --remat --budget rtx4090"
    assert run(*arguments.split(), "--share", "95%") == 0
    choices = capsys.readouterr().out.split("what fits")[1]
    assert "8 bit, remat, layerwise" in choices
    assert "never formed" not in choices  # its refresh takes 27 GB


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        # 0.75 and 0.95 of XLA's 25,353,519,104 bytes; a TPU is not preallocated.
        ("rtx4090", "rtx4090: 19.02 GB for this process, 0.75 of 25.35 GB, which is"),
        ("rtx4090 --share .95", "24.09 GB for this process, 0.95 of 25.35 GB. Start"),
        ("rtx4090 --share 95%", "program with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95."),
        ("v5e", "v5e: 17.18 GB for this process.\n"),
        (
            "24GB --share 0.75",
            "24GB: 18.00 GB for this process, 0.75 of 24.00 GB. Start",
        ),
    ],
)
def test_a_budget_is_what_jax_leaves_of_a_card(
    budget: str, expected: str, capsys: Output
) -> None:
    assert run("9m", "--method", "adamw", "--budget", *budget.split()) == 0
    assert expected in capsys.readouterr().out


def test_what_fits_the_whole_card_may_not_fit_jax_share(capsys: Output) -> None:
    asked = "1b --method adamw8bit --remat --no-layerwise --gradients formed --budget"
    whole = memory.plan("1b", "adamw8bit", memory.Setting(remat=True)).total
    size = f"{int(whole / 0.9)}B"
    assert run(*asked.split(), size) == 0
    assert run(*asked.split(), size, "--share", "0.75") == 1
    assert f"{whole / 0.9 * 0.75 / 1e9:.2f} GB for this process" in (
        capsys.readouterr().out
    )


def test_a_budget_that_is_too_small_says_by_how_much(capsys: Output) -> None:
    assert run("7b", "--method", "adamw", "--budget", "20GB") == 1
    assert "misses by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("7bb", "Did you mean '7b'"),
        ("9m --budget lots", "24GB"),
        ("9m --budget 0.75", "--budget CARD --share 0.75"),
        ("9m --budget 24", "'24' has no unit, and would be bytes. Write 24GB"),
        ("9m --budget t4 --share 1.5", "share=1.5 must be above 0 and at most 1"),
        ("9m --budget t4 --share 0%", "share=0% must be above 0"),
        ("9m --budget t4 --share most", "share=most must be"),
        ("9m --share 0.5", "Add --budget, such as --budget rtx4090"),
        ("9m --method adamq", "Did you mean"),
        ("9m --option rank", "name=value"),
        ("9m --option rank=0", "rank=0"),
        ("9m --option rank=-3", "rank=-3"),
        ("9m --option rnk=3", "Did you mean 'rank'"),
        ("9m --method adamw --option rank=3", "unknown option 'rank' of 'adamw'"),
        ("9m --method adamw8bit --option moment_dtype=float32", "unknown option"),
        ("9m --tokens 0", "tokens=0"),
        ("9m --layerwise --gradients never", "gradients=never with layerwise"),
        ("9m --png plan.txt", "Format 'txt' is not supported"),
    ],
)
def test_mistakes_are_named(arguments: str, message: str, capsys: Output) -> None:
    assert run(*arguments.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_png_is_drawn(tmp_path: Path, capsys: Output) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plan")
    file = tmp_path / "plan.png"
    assert run("60m", "--budget", "2GB", "--png", str(file)) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_bar_is_as_high_as_its_plan() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    from galore_optax.memory._show import _bars

    plans = [memory.plan("60m", name) for name in ("adamw", "galore_adamw8bit")]
    axes = figure.add_subplot()
    _bars(axes, plans)
    for place, plan in enumerate(plans):
        bars = [x for x in axes.patches if abs(x.get_x() + 0.31 - place) < 0.01]
        top = max(bar.get_y() + bar.get_height() for bar in bars)
        assert top == pytest.approx(plan.total / 1e9)


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("9m", "--png", "x.png") == 2
    assert 'pip install "galore_optax[plan]"' in capsys.readouterr().err


def test_an_unknown_card_is_told_the_nearest(capsys: Output) -> None:
    assert run("9m", "--budget", "a100-40") == 2
    told = capsys.readouterr().err
    assert "Did you mean 'a100-40gb'? Known cards: rtx3060, t4," in told
