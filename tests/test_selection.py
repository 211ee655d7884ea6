# SPDX-License-Identifier: Apache-2.0
"""What the user chooses, by patterns, trees and ranks, and the plan made of it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Dims

import galore_optax as go
from galore_optax._context import Whole, within
from galore_optax._selection.leaves import flatten, masked_paths, named_leaves
from galore_optax._selection.matrices import Plan
from galore_optax._selection.rule import Selection, rank_notice
from galore_optax._storage.projectors import Floating

BLOCK = {
    "embed": {"embedding": jnp.ones((50, 8))},
    "attn": {"q": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}},
    "mlp": {"up": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)}},
    "norm": {"scale": jnp.ones(8)},
}
KERNELS = {"attn/q/kernel", "mlp/up/kernel"}


def plan(
    params: Any, numbers: Any = None, rank: Any = 2, proj_type: Any = "std"
) -> Plan:
    return Selection(rank, 200, 1.0, proj_type, numbers, Floating(None)).plan(params)


def projected(params: Any, numbers: Any = None) -> set[str]:
    return {matrix.path for matrix in plan(params, numbers).projected}


def reasons(found: Plan) -> dict[str, str]:
    return dict(zip(found.flat.paths, found.reasons, strict=True))


def test_true_above_leaves_the_choice_to_the_rule() -> None:
    # The README's; Flax modules have biases unless told otherwise.
    only = {r"attn|mlp": True, r".*": None}
    assert projected(BLOCK, go.match_paths(only)) == KERNELS
    assert projected(BLOCK, go.match_paths({r".*": True})) == KERNELS
    assert projected(BLOCK, go.match_paths({r"mlp": True, r".*": None})) == {
        "mlp/up/kernel"
    }
    tree = {"embed": None, "attn": True, "mlp": {"up": True}, "norm": True}
    assert projected(BLOCK, tree) == KERNELS
    assert projected(BLOCK, True) == KERNELS


def test_true_at_a_leaf_selects_it() -> None:
    both = {"embed/embedding", *KERNELS}
    for pattern in ("embedding", "embed", "embed/embedding", r"embed\w*$"):
        assert projected(BLOCK, go.match_paths({pattern: True})) == both
    tree = {"embed": {"embedding": True}, "attn": True, "mlp": True, "norm": None}
    assert projected(BLOCK, tree) == both
    for numbers in (
        go.match_paths({"q/bias": True}),
        go.match_paths({"kernel|bias": True}),
        {"embed": None, "attn": {"q": {"kernel": True, "bias": True}}, "mlp": None}
        | {"norm": None},
    ):
        with pytest.raises(ValueError, match=r"selects 'attn/q/bias' of shape \(8,\)"):
            plan(BLOCK, numbers)


def test_true_at_every_leaf_means_no_bias_and_no_norm() -> None:
    stacked = {
        "norm": {"scale": jnp.ones((3, 8))},
        "up": {"kernel": jnp.ones((3, 8, 16)), "bias": jnp.ones((3, 16))},
    }
    for params in (stacked, {"up": BLOCK["mlp"]["up"], "norm": BLOCK["norm"]}):
        everywhere = jax.tree.map(lambda _: True, params)
        assert projected(params, everywhere) == {"up/kernel"}


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    numbers = go.match_paths({"atn": None, "mlp": True})
    with pytest.raises(
        ValueError, match=r"'atn', which matches no leaf.*'attn/q/bias'"
    ):
        go.galore(optax.sgd(1.0), rank=2, weight_dimension_numbers=numbers).init(BLOCK)
    # What an earlier pattern has taken, a later one may match all the same.
    everything = go.match_paths(
        {"kernel": True, "bias|scale|embedding": None, ".*": None}
    )
    assert projected(BLOCK, everything) == KERNELS


def test_patterns_match_leaves_that_were_taken_out() -> None:
    numbers = go.match_paths({"attn": None, "mlp": True})
    tx = go.galore(optax.sgd(1.0), rank=2, weight_dimension_numbers=numbers)
    labels = {"embed": "full", "attn": "full", "mlp": "low", "norm": "full"}
    parts = optax.partition({"low": tx, "full": optax.sgd(1.0)}, labels)
    updates, _ = parts.update(BLOCK, parts.init(BLOCK))
    assert jax.tree.structure(updates) == jax.tree.structure(BLOCK)
    assert projected({**BLOCK, "attn": {"q": None}}, numbers) == {"mlp/up/kernel"}


@pytest.mark.parametrize("spec", ["yes", 3, (0, 1)])
def test_a_wrong_value_is_refused_where_it_is_written(spec: Any) -> None:
    with pytest.raises(
        TypeError, match=r"match_paths\(\{'kernel': \.\.\.\}\) is .*Use"
    ):
        go.match_paths({"kernel": spec})


@pytest.fixture(scope="module")
def mlp() -> Any:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 8, 16, 1, use_final_bias=False, key=jax.random.key(0))
    return model, eqx.filter(model, eqx.is_array)


def test_none_in_params_is_no_entry(mlp: Any) -> None:
    _, params = mlp
    weights = {"layers/0/weight", "layers/1/weight"}
    everywhere = jax.tree.map(lambda _: True, params)
    for numbers in (
        go.match_paths({"layers": True}),
        go.match_paths({"weight": Dims(1, 0)}),
        everywhere,  # itself callable, as an Equinox module is
        lambda _: everywhere,
    ):
        assert projected(params, numbers) == weights
        tx = go.galore(optax.sgd(1.0), rank=2, weight_dimension_numbers=numbers)
        updates, _ = tx.update(params, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
    with pytest.raises(ValueError, match="entry at 'z'"):
        plan({"w": jnp.ones((8, 8))}, {"w": True, "z": None})


def test_an_unfiltered_model_names_what_is_no_array(mlp: Any) -> None:
    with pytest.raises(
        TypeError, match=r"'activation' is <.*and not an array.*eqx\.filter\(model"
    ):
        go.galore(optax.sgd(1.0), rank=2).init(mlp[0])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: Any
    key: Any
    value: Any


def test_an_attribute_called_value_is_no_box() -> None:
    params = {"attn": Attention(*(jnp.ones((8, 8)) for _ in range(3)))}
    paths = ("attn/query", "attn/key", "attn/value")
    assert flatten(params).paths == paths
    rules = {"value": True, "query|key": None}
    assert projected(params, go.match_paths(rules)) == {"attn/value"}
    tree = {"attn": Attention(None, None, Dims(1, 0))}
    assert projected(params, tree) == {"attn/value"}
    masked = {"attn": Attention(jnp.ones(2), optax.MaskedNode(), optax.MaskedNode())}
    assert masked_paths(masked) == list(paths[1:])


def test_no_box_has_a_part_in_a_path() -> None:
    nnx = pytest.importorskip("flax.nnx")
    pair = nnx.Param((jnp.ones(2), jnp.ones(3)))
    found = named_leaves({"a": nnx.Param(jnp.ones(2)), "b": pair})
    assert [path for path, _ in found] == ["a", "b/0", "b/1"]


def test_two_leaves_of_one_path_are_refused() -> None:
    params = {"a/b": jnp.ones((8, 4)), "a": {"b": jnp.ones((4, 8))}}
    with pytest.raises(ValueError, match=r"two leaves have the path 'a/b'.*Rename"):
        go.galore(optax.sgd(1.0), rank=2).init(params)


def test_arrays_are_looked_up_once() -> None:
    flat = flatten({"w": 1.0, "v": np.ones(3)})
    assert flat.values is flat.values


@pytest.mark.parametrize(
    ("shape", "rank", "proj_type", "whole"),
    [
        ((256, 10), 128, "std", True),
        ((256, 10), 10, "std", True),
        ((256, 10), 9, "std", False),
        ((8, 64), 8, "left", True),
        ((8, 64), 8, "right", False),  # 64 inputs become 8
        ((8, 64), 8, "reverse_std", False),
        ((8, 8), 8, "full", True),
        ((8, 64), 8, "full", False),
    ],
)
def test_what_projecting_does_not_make_smaller_stays_whole(
    shape: tuple[int, int], rank: int, proj_type: str, whole: bool
) -> None:
    params = {"w": jnp.ones(shape), "other": jnp.ones((512, 512))}
    for numbers in (None, {"w": True, "other": True}, go.match_paths({"w": True})):
        found = plan(params, numbers, rank, proj_type)
        assert (found.matrices[1] is None) == whole
        assert (reasons(found)["w"] == "rank saves nothing") == whole
        for matrix in found.projected:
            assert np.prod(matrix.coordinate_shape) < np.prod(matrix.shape)


def test_named_axes_are_projected_at_a_clipped_rank() -> None:
    params = {"w": jnp.ones((256, 10)), "v": jnp.ones((64, 64))}
    for numbers in (Dims(1, 0), {"w": Dims(1, 0), "v": Dims(1, 0)}):
        found = plan(params, numbers, 128)
        assert [matrix.rank for matrix in found.projected] == [64, 10]


def test_factors_of_low_rank_stay_whole() -> None:
    params = {
        "q": {"kernel": jnp.ones((64, 64))},
        "lora": {"a": jnp.ones((64, 4)), "b": jnp.ones((4, 64))},
    }
    found = plan(params, rank=4)
    assert [matrix.path for matrix in found.projected] == ["q/kernel"]


def test_a_rank_may_save_in_some_leaves_only() -> None:
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    seen = []

    def rank(leaf: go.Leaf) -> int:
        seen.append(leaf.path)
        return 8 if leaf.path == "a" else 2

    found = plan(params, rank=rank)
    assert seen == ["a", "b"]
    assert found.total == 1
    assert reasons(found) == {"a": "rank saves nothing", "b": "matrix"}
    assert found.projected[0].number == 0


def test_nothing_left_to_project_names_rank_and_dimension() -> None:
    params = {"up": {"kernel": jnp.ones((256, 10)), "bias": jnp.ones(10)}}
    with pytest.raises(
        ValueError,
        match=r"projects no leaf.*'up/kernel' \(256, 10\): rank saves nothing.*"
        r"'up/kernel' \(rank 128, dimension 10, .*Give a lower rank",
    ):
        go.galore(optax.sgd(1.0), rank=128).init(params)


def test_rank_notice() -> None:
    params = {name: jnp.ones((16, 8)) for name in "abcde"} | {"z": jnp.ones((64, 64))}
    assert rank_notice(plan(params, rank=7)) is None
    notice = rank_notice(plan(params, rank=8))
    assert notice is not None
    assert "'d' (rank 8, dimension 8, kept at full size), and 1 more. " in notice
    assert "'e'" not in notice
    assert "lower rank" in notice
    assert "\n" not in notice
    clipped = rank_notice(plan({"a": params["a"]}, Dims(1, 0), rank=9))
    assert clipped is not None
    assert "'a' (rank 9, dimension 8, clipped)" in clipped


def test_a_layer_gets_the_verdict_of_the_whole() -> None:
    whole = {
        "head": {"kernel": jnp.ones((8, 50))},
        "blocks": {
            "up": {"kernel": jnp.ones((3, 8, 64)), "bias": jnp.ones((3, 64))},
            "thin": {"kernel": jnp.ones((3, 8, 4)), "bias": jnp.ones((3, 4))},
        },
    }
    layer = {"blocks": jax.tree.map(lambda leaf: leaf[0], whole["blocks"])}
    numbers = go.match_paths({"head": None, "kernel": True})
    with within(whole=Whole(whole, jnp.int32(1))):
        found = plan(layer, numbers, rank=4)
    assert reasons(found) == {
        "blocks/thin/bias": "bias",
        "blocks/thin/kernel": "rank saves nothing",
        "blocks/up/bias": "bias",
        "blocks/up/kernel": "stacked",
    }
    assert found.total == 3
    assert [leaf.path for leaf in found.reached] == ["blocks/thin/kernel"]
