# SPDX-License-Identifier: Apache-2.0
"""The search for ranks and settings that fit."""

import itertools

import pytest

from galore_optax import memory
from galore_optax.memory import Method, NothingFits, Setting, Sizes

MODEL = Sizes.load("130m")
BOTH = [Method("adamw"), Method("galore_adamw")]
WAYS: tuple[dict[str, object], ...] = ({}, {"layerwise": True}, {"gradients": "never"})


def every(tokens: int = 256, batch: int = 1) -> list[Setting]:
    pairs = itertools.product((False, True), WAYS)
    return [Setting(tokens, batch, remat=x, **way) for x, way in pairs]  # type: ignore[arg-type]


def test_all_that_is_found_fits_best_first() -> None:
    found = memory.search(MODEL, BOTH, every(512, 4), 1_200_000_000)
    assert all(choice.plan.total <= 1_200_000_000 for choice in found)
    assert [choice.order for choice in found] == sorted(c.order for c in found)
    assert found[0].rank is None  # full before any rank


def test_what_fits_as_it_is_is_not_changed() -> None:
    found = memory.search(MODEL, BOTH, every(128), 10**12)
    assert [(c.method.name, c.rank, c.savings) for c in found] == [
        ("adamw", None, ()),
        ("galore_adamw", 384, ()),
    ]


def test_nothing_is_saved_in_vain() -> None:
    found = memory.search(MODEL, BOTH, every(512, 4), 1_200_000_000)
    for choice in found:
        same = [c for c in found if c.method.family == choice.method.family]
        assert not any(
            set(c.savings) < set(choice.savings)
            and (c.rank or 10**9) >= (choice.rank or 10**9)
            for c in same
        )


def test_a_given_rank_is_kept() -> None:
    methods = [Method("galore_adamw", (("rank", 77),))]
    found = memory.search(MODEL, methods, every(), 1_200_000_000)
    assert {choice.rank for choice in found} == {77}


def test_settings_that_are_not_given_are_not_tried() -> None:
    found = memory.search(MODEL, BOTH, [Setting(remat=True)], 10**10)
    assert {choice.savings for choice in found} == {("remat",)}
    assert {choice.rank for choice in found} == {None, 384}


def test_a_7b_model_fits_a_24_gb_card() -> None:
    methods = [Method("galore_adamw", (("rank", 1024),))]
    found = memory.search(Sizes.load("7b"), methods, every(), 24 * 10**9)
    assert found[0].method.name == "galore_adamw8bit"
    assert "layerwise" in found[0].savings


def test_gradients_are_never_formed_with_a_projection_alone() -> None:
    never = [Setting(remat=True, gradients="never")]
    found = memory.search(MODEL, BOTH, never, 10**10)
    savings = {choice.method.name: choice.savings for choice in found}
    assert savings["adamw"] == ("remat",)
    assert savings["galore_adamw"] == ("remat", "never formed")


def test_what_hinders_a_method_everywhere_is_said() -> None:
    with pytest.raises(ValueError, match="nothing to store"):
        memory.search(MODEL, [Method("sgd8bit")], every(), 10**12)


def test_nothing_fits_names_the_smallest_and_the_miss() -> None:
    methods = [Method("adamw"), Method("galore_adamw", (("rank", 64),))]
    settings = [Setting(remat=True)]
    coded = Method("galore_adamw8bit", (("rank", 64),))
    least = memory.plan(MODEL, coded, settings[0]).total
    with pytest.raises(NothingFits) as caught:
        memory.search(MODEL, methods, settings, least - 5_000_000)
    text = str(caught.value)
    assert "galore_adamw8bit(rank=64)" in text
    assert "misses by 5.00 MB" in text
    assert memory.search(MODEL, methods, settings, least)


def test_a_rank_of_any_size_has_an_8bit_version() -> None:
    methods = [Method("galore_adamw", (("rank", 700),))]
    budget = memory.plan(MODEL, methods[0], Setting(remat=True)).total - 10**7
    found = memory.search(MODEL, methods, every(), budget)
    assert "galore_adamw8bit" in {choice.method.name for choice in found}


def test_methods_without_moments_have_no_8bit_version() -> None:
    found = memory.search(MODEL, [Method("sgd")], [Setting(remat=True)], 10**10)
    assert {choice.method.name for choice in found} == {"sgd"}


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown method 'adamv'"):
        memory.search(MODEL, [Method("adamv")], every(), 10**10)
