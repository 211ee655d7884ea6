# SPDX-License-Identifier: Apache-2.0
"""The formulas, against numbers worked out by hand."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax
from galore_optax import layerwise, memory
from galore_optax.memory import Method, Setting, Sizes
from galore_optax.memory._plan import activations

# All widths differ: D 32, F 80, H·K 48, G·K 24.
SIZES = Sizes(96, 32, 80, 3, heads=4, key_heads=2, head_size=12)


def test_remat_saves_inputs_alone() -> None:
    setting = Setting(tokens=56, batch=5, remat=True)
    assert activations(SIZES, setting).saved == 3 * 5 * 56 * 32 * 2


def test_phases_of_a_plain_step_worked_out() -> None:
    setting = Setting(tokens=16, batch=2, remat=True)
    plan = memory.plan(SIZES, "sgd", setting)
    n, layer = 32, 2 * (32 * (48 + 24 + 24) + 48 * 32 + 3 * 32 * 80 + 2 * 32)
    embed, head = 2 * 96 * 32, 2 * (96 * 32 + 32)
    assert plan.weights == 3 * layer + embed + head
    loss, at_head, blocks, update, _ = plan.phases
    assert (loss.gradients, at_head.gradients) == (0, head)
    assert loss.activations == 3 * n * 32 * 2 + 6 * n * 96
    assert at_head.activations == 3 * n * 32 * 2 + 2 * n * 96
    assert loss.workspace == at_head.workspace == 2 * n * 32 * 2
    assert (blocks.gradients, blocks.activations) == (3 * layer, 3 * n * 32 * 2)
    assert blocks.workspace == layer + 11 * 4 * 16 * n + 4 * n * 80
    assert update.total == 3 * layer + embed


@pytest.mark.parametrize("tokens", [16, 640])
def test_a_tied_head_is_kept_until_the_embedding_has_its_gradient(tokens: int) -> None:
    def gradients(tied: bool, by_layer: bool) -> list[int]:
        setting = Setting(tokens=tokens, remat=True, layerwise=by_layer)
        plan = memory.plan(dataclasses.replace(SIZES, tied=tied), "sgd", setting)
        return [phase.gradients for phase in plan.phases]

    kept = 2 * 96 * min(32, tokens)  # the head's part, or the logits' gradient
    head = -2 * 96 * 32  # its own gradient is its norm's
    for by_layer, last in ((False, 0), (True, kept)):
        pairs = zip(gradients(True, by_layer), gradients(False, by_layer), strict=True)
        assert [x - y for x, y in pairs] == [0, head, kept, kept, last]


def test_coordinates_of_galore_worked_out() -> None:
    plan = memory.plan(SIZES, Method("galore_sgd", (("rank", 8),)))
    blocks = plan.phases[2].gradients
    assert plan.phases[4].gradients == blocks
    assert plan.phases[4].workspace == 3 * 4 * 8 * 80


def test_states_are_those_of_the_papers_formula() -> None:
    method = Method("galore_adam", (("rank", 128), ("moment_dtype", "bfloat16")))
    state = memory.plan("60m", method).state
    d, f, r, layers = 512, 1376, 128, 8
    projectors = layers * (4 * d * r + 3 * d * r)
    moments = layers * (4 * r * d + 3 * r * f + 2 * d) + 2 * 32000 * d + d
    assert state.projectors == 2 * projectors
    assert state.first_moments == state.second_moments == 2 * moments


def test_moments_of_leaves_at_full_size_are_those_of_optax() -> None:
    state = memory.plan("60m", Method("galore_adam", (("rank", 128),))).state
    d, f, r, layers = 512, 1376, 128, 8
    low, norms = layers * (4 * r * d + 3 * r * f), (2 * layers + 1) * d
    full = 2 * 32000 * d + norms
    assert state.dtypes["first_moments"] == {"f32": 4 * low, "bf16": 2 * full}
    assert state.dtypes["second_moments"] == state.dtypes["first_moments"]
    assert state.first_moments == 4 * low + 2 * full


def test_a_plan_knows_adamw_at_both_precisions() -> None:
    galore = Method("galore_adamw", (("rank", 8),))
    plan = memory.plan(SIZES, galore)
    assert plan.adamw == memory.plan(SIZES, "adamw").state.total
    method = Method("adamw", (("moment_dtype", "float32"),))
    assert plan.adamw_f32 == memory.plan(SIZES, method).state.total
    wide = memory.plan(SIZES, galore, Setting(dtype="float32"))
    assert wide.adamw == wide.adamw_f32


def test_terms_add_up() -> None:
    plan = memory.plan("130m", "galore_adamw8bit", Setting(512, 2))
    assert sum(plan.terms.values()) == plan.total
    assert plan.total == plan.weights + plan.state.total + plan.peak.total


def test_accumulation_holds_sums_beside_gradients() -> None:
    setting = Setting(tokens=64, remat=True)
    one = memory.plan("130m", "adamw", setting)
    four = memory.plan("130m", "adamw", dataclasses.replace(setting, accumulation=4))
    assert four.phases[2].gradients == one.phases[2].gradients + one.weights
    assert four.phases[3].gradients == one.weights


def test_layerwise_holds_the_gradients_of_one_layer() -> None:
    setting = Setting(tokens=64, remat=True, layerwise=True)
    one = memory.plan("7b", "galore_adamw8bit", setting)
    plain = memory.plan("7b", "galore_adamw8bit", Setting(tokens=64, remat=True))
    assert one.phases[2].gradients == plain.phases[2].gradients // 32
    assert one.total < plain.total / 1.5


def test_layerwise_adds_up_coordinates() -> None:
    setting = Setting(tokens=64, remat=True, layerwise=True)
    method = Method("galore_sgd", (("rank", 8),))
    one = memory.plan(SIZES, method, setting)
    two = memory.plan(SIZES, method, dataclasses.replace(setting, accumulation=2))
    # Of q, k, v, o the longer side; of gate, up, down F; norms; embedding and head.
    low = 3 * (8 * (48 + 32 + 32 + 48) + 3 * 8 * 80 + 2 * 32)
    sums = 4 * (low + 2 * 96 * 32 + 32)
    assert two.phases[2].gradients - one.phases[2].gradients == sums
    copies = 4 * (2 * 96 * 32 + 32)  # of the sums of embedding and head
    assert two.phases[2].workspace - one.phases[2].workspace == copies


def never(**how: Any) -> Setting:
    return Setting(tokens=16, batch=2, remat=True, gradients="never", **how)


def test_coordinates_take_the_place_of_gradients_never_formed() -> None:
    plan = memory.plan(SIZES, Method("galore_sgd", (("rank", 8),)), never())
    _, at_head, blocks, update, lift, refresh = plan.phases
    norms, matrices = 2 * 3 * 2 * 32, 2 * 3 * (8 * (48 + 32 + 32 + 48) + 3 * 8 * 80)
    low = matrices + norms
    assert at_head.gradients == 2 * (96 * 32 + 32)
    assert blocks.gradients == lift.gradients == low
    assert refresh.gradients == matrices
    assert update.gradients == low + 2 * 96 * 32
    assert lift.workspace == 2 * 3 * 8 * 80  # the largest leaf's, in its dtype
    n, bases = 32, 2 * 3 * 8 * (32 + 24 + 24 + 32 + 3 * 32)
    assert refresh.activations == blocks.activations + 8 * n * 96
    assert refresh.workspace == blocks.workspace + 2 * bases
    assert all("refresh" not in text for text in plan.not_modelled)


def test_a_refresh_in_shares_holds_one_at_a_time() -> None:
    method = Method("galore_sgd", (("rank", 8),))
    whole = memory.plan(SIZES, method, never()).phases[5]
    plan = memory.plan(SIZES, method, never(refresh_shares=3))
    shares = plan.phases[5:]
    assert [phase.name for phase in shares] == ["refresh"] * 3
    assert sum(phase.gradients for phase in shares) == whole.gradients
    assert all(0.2 < phase.gradients / whole.gradients < 0.5 for phase in shares)
    assert "shares" in plan.not_modelled[0]


def test_sums_of_micro_batches_are_coordinates() -> None:
    method = Method("galore_sgd", (("rank", 8),))
    one = memory.plan(SIZES, method, never()).phases
    four = memory.plan(SIZES, method, never(accumulation=4)).phases
    sums = one[1].gradients + one[3].gradients  # head; blocks and embedding
    assert [x.gradients for x in four[:3]] == [x.gradients + sums for x in one[:3]]
    assert four[3].gradients == four[4].gradients == sums
    assert four[5] == one[5]  # of the first micro-batch


def test_32_bit_weights_are_lifted_at_full_size() -> None:
    method = Method("galore_sgd", (("rank", 8),))
    plan = memory.plan(SIZES, method, never(dtype="float32"))
    assert plan.phases[4].workspace == 2 * 4 * 3 * 32 * 80


@pytest.mark.parametrize(
    ("method", "gradients"),
    [("svd", "whole"), ("random", None), ("power", "low"), ("randomized", "low")],
)
def test_what_a_refresh_holds_is_that_of_its_method(
    method: str, gradients: str | None
) -> None:
    options = ("rank", 8), ("subspace", method)
    plan = memory.plan(SIZES, Method("galore_sgd", options), never())
    found = {x.name: x.gradients for x in plan.phases}.get("refresh")
    low = plan.phases[2].gradients - 2 * 3 * 2 * 32  # bytes of norms
    assert found == {"whole": plan.weights, "low": low, None: None}[gradients]


def test_without_a_projection_gradients_are_formed() -> None:
    never_formed = memory.plan(SIZES, "adamw", never())
    formed = memory.plan(SIZES, "adamw", Setting(16, 2, remat=True))
    assert never_formed.phases == formed.phases


def test_what_passes_leave_without_remat_is_not_modelled() -> None:
    setting = Setting(16, gradients="never")
    plan = memory.plan(SIZES, Method("galore_sgd", (("rank", 8),)), setting)
    assert "without remat" in plan.not_modelled[0]


def test_a_tree_has_coordinates_too() -> None:
    params = {"up": {"kernel": jnp.zeros((64, 128))}, "bias": jnp.zeros(7)}
    tx = galore_optax.galore_adamw(0.1, rank=4)
    plan = memory.plan(params, tx, Setting(gradients="never"))
    assert plan.phases[0].gradients == 4 * (4 * 128 + 7)


@pytest.mark.parametrize("name", ["adamw", "galore_adamw8bit", "galore_adafactor"])
def test_state_of_layerwise_steps_is_that_of_their_init(name: str) -> None:
    setting = Setting(layerwise=True, remat=True)
    method = Method(name)
    if method.is_galore:
        method = method.with_options(rank=8)
    model = layerwise.Model(*3 * (lambda *_: None,))  # init calls no function
    init = layerwise.make_step(model, method.make()).init
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), memory.shapes(SIZES))
    found = sum(x.nbytes for x in jax.tree.leaves(init(params)))
    assert memory.plan(SIZES, method, setting).state.total == found


def test_any_tree_has_a_plan() -> None:
    params = {"up": {"kernel": jnp.zeros((64, 128))}, "bias": jnp.zeros(7)}
    plan = memory.plan(params, optax.adam(0.1), name="mine")
    assert (plan.name, plan.weights) == ("mine", 4 * (64 * 128 + 7))
    assert plan.peak.gradients == plan.weights
    assert any("activations" in text for text in plan.not_modelled)
    lifted = memory.plan(params, galore_optax.galore_adamw(0.1, rank=4))
    assert lifted.peak.workspace == 4 * 4 * 128


def test_a_tree_has_no_layers() -> None:
    with pytest.raises(ValueError, match="Sizes"):
        memory.plan({"w": jnp.zeros((8, 8))}, "adamw", Setting(layerwise=True))


@pytest.mark.parametrize("name", ["tokens", "batch", "accumulation"])
def test_settings_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        Setting(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("how", "known"),
    [({"dtype": "bf16"}, "bfloat16"), ({"gradients": "always"}, "never")],
)
def test_unknown_words_are_refused(how: dict[str, Any], known: str) -> None:
    with pytest.raises(ValueError, match=known):
        Setting(**how)


def test_gradients_of_layers_are_formed() -> None:
    with pytest.raises(ValueError, match="gradients=never with layerwise"):
        never(layerwise=True)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Method("galore_adamm"), "Did you mean 'galore_adam'"),
        (Method("galore_adamw", (("rnak", 4),)), "Did you mean 'rank'"),
        (Method("galore_adamw", (("subspace", "swd"),)), "Did you mean 'svd'"),
        (Method("galore_adamw", (("rank", 0),)), "rank=0"),
        (Method("galore_adamw", (("rank", -4),)), "rank=-4"),
        (Method("sgd8bit"), "nothing to store"),
    ],
)
def test_methods_that_are_none_are_refused(method: Method, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        memory.plan("9m", method)


def test_nothing_is_allocated() -> None:
    before = len(jax.live_arrays())
    plan = memory.plan("13b", "galore_adamw", Setting(4096, 8))
    assert len(jax.live_arrays()) == before
    assert math.isclose(plan.weights / 1e9, 26.03, abs_tol=0.01)
