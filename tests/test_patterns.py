# SPDX-License-Identifier: Apache-2.0
"""Ranks, gaps and scales by path, and ranks as shares."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax as go
from galore_optax import layerwise

PARAMS = {
    "attn": {"kernel": jnp.ones((16, 16)), "bias": jnp.ones(16)},
    "mlp": {
        "up": {"kernel": jnp.ones((16, 48))},
        "down": {"kernel": jnp.ones((48, 16))},
    },
}


def described(params: Any = PARAMS, **arguments: Any) -> dict[str, Any]:
    tx = go.galore(optax.sgd(1.0), **arguments)
    return {leaf.path: leaf for leaf in go.describe(tx, params) if leaf.rank}


def ranks(rank: Any, params: Any = PARAMS) -> dict[str, int]:
    return {path: leaf.rank for path, leaf in described(params, rank=rank).items()}


def test_the_first_pattern_that_is_found_decides() -> None:
    expected = {"attn/kernel": 3, "mlp/down/kernel": 4, "mlp/up/kernel": 5}
    assert ranks({r"attn": 3, r"down": 4, r"mlp": 5}) == expected
    assert ranks({r"attn": 3, r"mlp": 5, r"down": 4})["mlp/down/kernel"] == 5


def test_gap_and_scale_go_by_patterns_too() -> None:
    found = described(
        rank=2, update_proj_gap={"attn": 7, ".*": 50}, scale={"mlp": 0.5, "attn": 1}
    )
    told = {path: (leaf.gap, leaf.scale) for path, leaf in found.items()}
    assert told == {
        "attn/kernel": (7, 1.0),
        "mlp/down/kernel": (50, 0.5),
        "mlp/up/kernel": (50, 0.5),
    }


def test_state_and_step_have_these_ranks() -> None:
    tx = go.galore_adamw(1e-2, rank={"attn": 3, ".*": 0.25})
    updates, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert state.projector["attn"]["kernel"].shape == (16, 3)
    assert state.projector["mlp"]["up"]["kernel"].shape == (16, 4)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)


@pytest.mark.parametrize(
    ("share", "rank"),
    [(0.25, 4), (0.5, 8), (0.1, 2), (0.01, 1), (0.9, 14)],  # 1.6 to 2, 14.4 to 14
)
def test_a_share_is_of_the_shorter_dimension(share: float, rank: int) -> None:
    assert set(ranks(share).values()) == {rank}
    wide = {"w": jnp.ones((48, 16)), "v": jnp.ones((32, 8))}
    assert ranks(0.25, wide) == {"w": 4, "v": 2}


def test_a_share_may_come_from_a_pattern_or_a_callable() -> None:
    assert ranks({"attn": 0.5, "mlp": 3})["attn/kernel"] == 8
    assert set(ranks(lambda leaf: 1 / 4).values()) == {4}


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -0.5, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"positive int, or a share .* 0 and 1"):
        go.galore(optax.sgd(1.0), rank=share)
    with pytest.raises(ValueError, match=r"of 'attn/kernel' must be .*a share"):
        go.galore(optax.sgd(1.0), rank=lambda leaf: share).init(PARAMS)


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    for name, value in (("rank", 2), ("update_proj_gap", 5), ("scale", 0.5)):
        arguments = {"rank": 2, name: {"atn": value, ".*": value}}
        with pytest.raises(
            ValueError, match=rf"{name} has the pattern 'atn', which .*'attn/bias'"
        ):
            go.galore(optax.sgd(1.0), **arguments).init(PARAMS)


def test_a_projected_leaf_without_a_pattern_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"rank says nothing about 'mlp/down/kernel'.*r'\.\*': 4"
    ):
        go.galore(optax.sgd(1.0), rank={"attn": 4}).init(PARAMS)
    # What is at full size needs none.
    no_mlp = go.match_paths({"mlp": None, ".*": True})
    tx = go.galore(optax.sgd(1.0), rank={"attn": 4}, weight_dimension_numbers=no_mlp)
    assert [row.path for row in go.describe(tx, PARAMS) if row.rank] == ["attn/kernel"]


def test_patterns_match_leaves_that_were_taken_out() -> None:
    tx = go.galore(optax.sgd(1.0), rank={"attn": 4, "mlp": 3})
    labels = {"attn": "plain", "mlp": "low"}
    parts = optax.partition({"low": tx, "plain": optax.sgd(1.0)}, labels)
    updates, _ = parts.update(PARAMS, parts.init(PARAMS))
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"rank": {"attn": 0}}, r"rank=0 of 'attn' must be a positive int"),
        ({"rank": {"attn": True}}, r"rank=True of 'attn' must be a positive int"),
        ({"rank": {}}, r"rank=\{\} names no pattern"),
        ({"update_proj_gap": {"a": 0.5}}, r"update_proj_gap=0\.5 of 'a' must be"),
        ({"scale": {"attn": -1.0}}, r"scale=-1\.0 of 'attn' must be positive"),
    ],
)
def test_a_wrong_value_is_refused_where_it_is_written(
    argument: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        go.galore(optax.sgd(1.0), **argument)


def test_each_helper_is_told_from_the_other() -> None:
    numbers = go.match_paths({"attn": True, ".*": None})
    with pytest.raises(TypeError, match=r"rank was given what match_paths.*rank=\{"):
        go.galore(optax.sgd(1.0), rank=numbers)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"is 64\. Use .*rank=\{pattern: rank"):
        go.match_paths({"attn": 64})  # type: ignore[dict-item]


def test_patterns_are_no_hyperparameters() -> None:
    for inject in (
        go.inject_hyperparams,
        lambda make: optax.inject_hyperparams(make, static_args=go.STATIC_ARGS),
    ):
        tx = inject(go.galore_adamw)(1e-2, rank={"attn": 4, ".*": 2}, scale={".*": 0.5})
        state = tx.init(PARAMS)
        assert "scale" not in state.hyperparams
        tx.update(PARAMS, state, PARAMS)


def test_a_layer_has_the_rank_of_its_path() -> None:
    params = layerwise.Params(
        {"embedding": jnp.ones((10, 16))},
        {"attn": jnp.ones((2, 16, 16)), "mlp": jnp.ones((2, 16, 32))},
        {"bias": jnp.ones(16)},
    )
    model = layerwise.Model(
        embed=lambda p, batch: p["embedding"][batch],
        block=lambda p, x, batch: x @ p["attn"] + (x @ p["mlp"])[..., :16],
        head=lambda p, embed, x, batch: jnp.mean((x + p["bias"]) ** 2),
    )
    tx = go.galore(optax.adam(1e-3), rank={"blocks/attn": 3, "blocks/mlp": 0.5})
    state = layerwise.make_step(model, tx).init(params)
    found = state.blocks.projector.blocks
    assert found["attn"].shape == (2, 16, 3)
    assert found["mlp"].shape == (2, 16, 8)
