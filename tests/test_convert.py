# SPDX-License-Identifier: Apache-2.0
"""A state of one transformation, converted, is one that another goes on from."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from tests.helpers import normal_like

PARAMS = normal_like(
    {
        "embedding": jnp.ones((20, 16)),
        "layers": {"up": {"kernel": jnp.ones((2, 16, 24)), "bias": jnp.ones((2, 24))}},
        "w": jnp.ones((32, 16)),
    },
    seed=0,
)
CODE = go.codes.companded(min_size=64)
Tx = optax.GradientTransformationExtraArgs


def adamw(rank: Any = 8, **given: Any) -> Tx:
    return go.galore_adamw(1e-2, rank=rank, **given)


def in_8bit(rank: Any = 8, **given: Any) -> Tx:
    return go.galore_adamw8bit(1e-2, rank=rank, code=CODE, **given)


def trained(tx: Any, steps: int = 3, params: Any = PARAMS) -> Any:
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        _, state = update(normal_like(params, seed=step + 1), state, params)
    return state


def goes_on(tx: Any, state: Any, params: Any = PARAMS) -> Any:
    """A step, whose state is of the types that `init` makes."""
    updates, new = jax.jit(tx.update)(normal_like(params, seed=9), state, params)
    assert jax.tree.structure(new) == jax.tree.structure(tx.init(params))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(updates))
    return updates


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_nothing_changes_where_nothing_differs() -> None:
    tx = adamw()
    state = trained(tx)
    same = adamw(scale=0.5, update_proj_gap=7, subspace=go.subspace.svd())
    assert_equal(go.convert_state(state, tx, same, PARAMS), state)
    coded = in_8bit(projector_dtype="int4")
    state = trained(coded)
    assert_equal(go.convert_state(state, coded, coded, PARAMS), state)


@pytest.mark.parametrize(
    "proj_type",
    [
        "std",
        pytest.param("reverse_std", marks=pytest.mark.slow),
        pytest.param("full", marks=pytest.mark.slow),
    ],
)
def test_a_lower_rank_keeps_what_leads(proj_type: Any) -> None:
    old, new = adamw(8, proj_type=proj_type), adamw(3, proj_type=proj_type)
    state = trained(old)
    found = go.convert_state(state, old, new, PARAMS)
    wide, low = (jax.tree.leaves(x.projector) for x in (state, found))
    for p, q in zip(wide, low, strict=True):
        np.testing.assert_array_equal(q, p[..., :3])
    for field in ("mu", "nu"):
        before, after = (getattr(x.inner_state[0], field) for x in (state, found))
        np.testing.assert_array_equal(
            after["w"], before["w"][tuple(slice(n) for n in after["w"].shape)]
        )
        np.testing.assert_array_equal(after["embedding"], before["embedding"])
    for kept in ("count", "key", "refresh"):
        assert_equal(getattr(found, kept), getattr(state, kept))
    goes_on(new, found)


@pytest.mark.parametrize(
    "proj_type", ["std", pytest.param("full", marks=pytest.mark.slow)]
)
def test_a_higher_rank_adds_orthonormal_columns(proj_type: Any) -> None:
    old, new = adamw(3, proj_type=proj_type), adamw(8, proj_type=proj_type)
    state = trained(old)
    found = go.convert_state(state, old, new, PARAMS)
    pairs = zip(*(jax.tree.leaves(x.projector) for x in (state, found)), strict=True)
    for p, q in pairs:
        np.testing.assert_array_equal(q[..., :3], p)
        gram = jnp.swapaxes(q, -1, -2) @ q
        # Dot products of at most 32 terms in f32.
        np.testing.assert_allclose(
            gram, jnp.broadcast_to(jnp.eye(8), gram.shape), atol=64 * 2.0**-24
        )
    goes_on(new, found)


def test_moments_along_new_columns() -> None:
    old, new = adamw(3), adamw(8)
    state = trained(old)
    found = go.convert_state(state, old, new, PARAMS).inner_state[0]
    before = state.inner_state[0]
    low, high = before.mu["w"], found.mu["w"]  # the 16 inputs are projected
    assert (low.shape, high.shape) == ((32, 3), (32, 8))
    np.testing.assert_array_equal(high[:, :3], low)
    assert not np.any(high[:, 3:])
    np.testing.assert_array_equal(found.nu["w"][:, :3], before.nu["w"])
    mean = np.mean(before.nu["w"], axis=1, keepdims=True)
    np.testing.assert_allclose(found.nu["w"][:, 3:], np.tile(mean, 5), rtol=1e-6)


def test_steps_along_new_columns_are_no_longer_than_usual() -> None:
    # The gradient is one in every coordinate, so that a step of Adam is the rate.
    params = {"w": jnp.zeros((16, 16))}
    keep = {"scale": 1.0, "weight_decay": 0.0}
    old, new = adamw(4, **keep), adamw(8, **keep)

    def gradients(state: Any) -> Any:
        p = state.projector["w"]
        return {"w": jnp.ones((16, p.shape[1])) @ p.T}

    state, lengths = old.init(params), []
    for _ in range(30):
        _, state = old.update(gradients(state), state, params, refresh=False)
    state = go.convert_state(state, old, new, params)
    for _ in range(12):
        updates, state = new.update(gradients(state), state, params, refresh=False)
        lengths.append(np.max(np.abs(updates["w"] @ state.projector["w"])))
    # With zeros the twelfth would be 6.6 times as long.
    assert max(lengths) < 1.1 * 1e-2
    assert lengths[-1] > 0.5 * 1e-2


def test_eight_bits_and_back() -> None:
    full, coded = adamw(), in_8bit()
    state = trained(full)
    stored = go.convert_state(state, full, coded, PARAMS)
    for field, signed in (("mu", True), ("nu", False)):
        for x, y in zip(
            jax.tree.leaves(getattr(state.inner_state[0], field)),
            jax.tree.leaves(
                getattr(stored.inner_state[0], field),
                is_leaf=lambda node: isinstance(node, go.codes.Quantized),
            ),
            strict=True,
        ):
            expected = CODE.encode(x, signed) if CODE.suits(x.shape) else (x, 1)
            jax.tree.map(np.testing.assert_array_equal, tuple(y), tuple(expected))
    goes_on(coded, stored)
    back = go.convert_state(stored, coded, full, PARAMS)
    moment = CODE.decode(CODE.encode(state.inner_state[0].mu["w"], True), True)
    np.testing.assert_array_equal(back.inner_state[0].mu["w"], moment)
    assert_equal(back.projector, state.projector)
    goes_on(full, back)


@pytest.mark.slow
def test_rank_and_precision_at_once() -> None:
    old, new = adamw(4), in_8bit({"layers": 6, ".*": 0.5}, projector_dtype="int8")
    state = go.convert_state(trained(old), old, new, PARAMS)
    assert state.inner_state[0].mu["w"].codes.shape == (32, 8)
    assert state.projector["w"].codes.dtype == jnp.int8
    goes_on(new, state)
    goes_on(old, go.convert_state(state, new, old, PARAMS))


def test_projectors_in_few_bits_become_what_they_stand_for() -> None:
    coded, plain = adamw(projector_dtype="int8"), adamw()
    state = trained(coded)
    found = go.convert_state(state, coded, plain, PARAMS)
    gradients = normal_like(PARAMS, seed=5)
    energies = (
        go.captured_energy(tx, x, gradients)["w"]
        for tx, x in ((coded, state), (plain, found))
    )
    np.testing.assert_allclose(*energies, rtol=1e-5)  # the same numbers, in f32
    goes_on(plain, found)


WRAPPED = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "MultiSteps": lambda tx: go.MultiSteps(tx, 2).gradient_transformation(),
    "ProjectedMultiSteps": lambda tx: go.ProjectedMultiSteps(tx, 2),
    "partition": lambda tx: optax.partition(
        {"low": tx, "full": optax.sgd(0.1)},
        {"embedding": "full", "layers": "low", "w": "low"},
    ),
}


@pytest.mark.parametrize(
    "name",
    ["partition"]
    + [pytest.param(x, marks=pytest.mark.slow) for x in WRAPPED if x != "partition"],
)
def test_whatever_is_around(name: str) -> None:
    old, new = WRAPPED[name](adamw(6)), WRAPPED[name](in_8bit(4))
    state = go.convert_state(trained(old), old, new, PARAMS)
    goes_on(new, state)
    wanted = jax.eval_shape(new.init, PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, wanted)


def test_hyperparameters_go_on() -> None:
    make = go.inject_hyperparams(go.galore_adamw)
    old, new = make(1e-2, rank=8), make(5e-2, rank=4)
    state = go.convert_state(trained(old), old, new, PARAMS)
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(1e-2)
    goes_on(new, state)


@pytest.mark.slow
def test_adafactor_has_factors() -> None:
    old, new = (go.galore_adafactor(1e-2, rank=r, b1=0.9) for r in (4, 6))
    state = go.convert_state(trained(old), old, new, PARAMS)
    col = state.inner_state.col["w"]
    assert col.shape == (6,)
    np.testing.assert_allclose(col[4:], np.mean(col[:4]), rtol=1e-6)
    goes_on(new, state)


def test_boxes_of_nnx() -> None:
    nnx = pytest.importorskip("flax.nnx")
    params = nnx.state(nnx.Linear(16, 24, rngs=nnx.Rngs(0)), nnx.Param)
    old, new = adamw(4), in_8bit(6)
    state = go.convert_state(old.init(params), old, new, params)
    assert jax.tree.structure(state) == jax.tree.structure(new.init(params))
    back = go.convert_state(state, new, old, params)
    assert jax.tree.structure(back) == jax.tree.structure(old.init(params))


def test_under_jit_and_for_shapes() -> None:
    old, new = adamw(4), in_8bit(6)
    state, shapes = trained(old), jax.eval_shape(lambda: PARAMS)
    found = jax.jit(lambda x: go.convert_state(x, old, new, shapes))(state)
    goes_on(new, found)


def without_w(tree: Any) -> Any:
    return {key: value for key, value in tree.items() if key != "w"}


@pytest.mark.parametrize(
    ("old", "new", "made_by", "message"),
    [
        (adamw(4), adamw(6), adamw(5), r"'projector/layers/up/kernel' is float32\[2, "),
        (adamw(4), adamw(6), optax.adam(1e-3), r"'\w.*' is .*, and should be"),
        (
            adamw(4),
            adamw(4, weight_dimension_numbers=go.match_paths({"w": None})),
            adamw(4),
            r"'w' is projected by old alone",
        ),
        (
            adamw(4),
            adamw({"w": 16, ".*": 4}),
            adamw(4),
            r"'w' is projected by old alone.*rank that saves",
        ),
        (
            adamw(4),
            adamw(4, proj_type="reverse_std"),
            adamw(4),
            r"'layers/up/kernel' is projected on another side",
        ),
        (
            adamw(4),
            go.galore(optax.sgd(0.1, momentum=0.9), rank=4),
            adamw(4),
            r"state of new alone holds 'inner_state/0/trace/.*differ in more than",
        ),
    ],
    ids=["rank", "adam", "leaf", "too high", "side", "inner"],
)
def test_what_cannot_be_converted_is_named(
    old: Any, new: Any, made_by: Any, message: str
) -> None:
    state = made_by.init(PARAMS)
    with pytest.raises(ValueError, match=message):
        go.convert_state(state, old, new, PARAMS)


def test_another_tree_is_named() -> None:
    tx = adamw(4)
    state = tx.init(without_w(PARAMS))
    with pytest.raises(ValueError, match=r"'projector/w' is nothing, and should be"):
        go.convert_state(state, tx, tx, PARAMS)
