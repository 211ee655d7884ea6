# SPDX-License-Identifier: Apache-2.0
"""The search for settings that fit."""

import pytest

from galore_optax import memory
from galore_optax.memory import Method, NothingFits, Setting, Sizes, Space

MODEL = Sizes.load("130m")
BOTH = [Method("adamw"), Method("galore_adamw")]


def test_all_that_is_found_fits_best_first() -> None:
    found = memory.search(MODEL, BOTH, Setting(512, 4), 1_200_000_000)
    assert all(choice.plan.total <= 1_200_000_000 for choice in found)
    assert [choice.order for choice in found] == sorted(c.order for c in found)
    assert found[0].rank is None  # full before any rank


def test_what_fits_as_it_is_is_not_changed() -> None:
    found = memory.search(MODEL, BOTH, Setting(128), 10**12)
    assert [(c.method.name, c.rank, c.compromises) for c in found] == [
        ("adamw", None, ()),
        ("galore_adamw", 384, ()),
    ]


def test_no_compromise_is_in_vain() -> None:
    budget = 1_200_000_000
    found = memory.search(MODEL, BOTH, Setting(512, 4), budget)
    for choice in found:
        same = [c for c in found if c.method.family == choice.method.family]
        assert not any(
            set(c.compromises) < set(choice.compromises)
            and (c.rank or 10**9) >= (choice.rank or 10**9)
            for c in same
        )


def test_a_given_rank_is_kept() -> None:
    methods = [Method("galore_adamw", (("rank", 77),))]
    found = memory.search(MODEL, methods, Setting(256), 1_200_000_000)
    assert {choice.rank for choice in found} == {77}


def test_a_closed_space_is_not_left() -> None:
    space = Space(
        (64,), eight_bit=False, remat=(True,), layerwise=(False,), shrink=False
    )
    found = memory.search(MODEL, BOTH, Setting(256), 10**10, space)
    assert {choice.compromises for choice in found} == {("remat",)}
    assert {choice.rank for choice in found} == {None, 64}


def test_smaller_micro_batches_make_the_same_batch() -> None:
    space = Space(remat=(False,), layerwise=(False,), eight_bit=False)
    (found,) = memory.search(
        MODEL, [Method("adamw")], Setting(256, 16), 2_000_000_000, space
    )
    setting = found.plan.setting
    assert setting.batch * setting.accumulation == 16
    assert found.compromises == ("half the micro-batch",) * len(found.compromises)
    assert setting.batch < 16


def test_a_7b_model_fits_a_24_gb_card() -> None:
    methods = [Method("galore_adamw", (("rank", 1024),))]
    found = memory.search(Sizes.load("7b"), methods, Setting(256), 24 * 10**9)
    assert found[0].method.name == "galore_adamw8bit"
    assert "layerwise" in found[0].compromises


def test_nothing_fits_names_the_smallest_and_the_miss() -> None:
    space = Space((64,), layerwise=(False,), remat=(True,), shrink=False)
    least = memory.plan(
        MODEL, Method("galore_adamw8bit", (("rank", 64),)), Setting(remat=True)
    ).total
    with pytest.raises(NothingFits) as caught:
        memory.search(MODEL, BOTH, Setting(), least - 5_000_000, space)
    text = str(caught.value)
    assert "galore_adamw8bit(rank=64)" in text
    assert "misses by 5.00 MB" in text
    assert memory.search(MODEL, BOTH, Setting(), least, space)


def test_a_rank_of_any_size_has_an_8bit_version() -> None:
    methods = [Method("galore_adamw", (("rank", 700),))]
    budget = memory.plan(MODEL, methods[0], Setting(remat=True)).total - 10**7
    found = memory.search(MODEL, methods, Setting(), budget)
    assert "galore_adamw8bit" in {choice.method.name for choice in found}


def test_methods_without_moments_have_no_8bit_version() -> None:
    found = memory.search(MODEL, [Method("sgd")], Setting(remat=True), 10**10)
    assert {choice.method.name for choice in found} == {"sgd"}
