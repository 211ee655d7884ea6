# SPDX-License-Identifier: Apache-2.0
"""Ready-made optimizers under `inject_hyperparams`, ours and that of Optax."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from tests.helpers import normal, normal_like

LR = 1e-2
READY_MADE = {
    "galore_adamw": go.galore_adamw,
    "galore_adamw8bit": go.galore_adamw8bit,
    "galore_adafactor": go.galore_adafactor,
}
each = pytest.mark.parametrize("factory", READY_MADE.values(), ids=READY_MADE)


def of_optax(factory: Any) -> Any:
    return optax.inject_hyperparams(factory, static_args=go.STATIC_ARGS)


both = pytest.mark.parametrize(
    "inject", [go.inject_hyperparams, of_optax], ids=["ours", "of optax"]
)


def params(dtype: Any = jnp.float32) -> Any:
    return {"kernel": normal(0, (16, 64), dtype), "bias": jnp.ones(64, dtype)}


def matrices(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, tree)


@both
@each
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_state_keeps_its_types(inject: Any, factory: Any, dtype: Any) -> None:
    """Or a step is compiled twice, and one compiled ahead refuses its own output."""
    tx, weights = inject(factory)(LR, rank=4), params(dtype)
    first = jax.eval_shape(tx.init, weights)
    _, second = jax.eval_shape(tx.update, weights, first, weights)
    assert {"learning_rate", "scale"} <= set(first.hyperparams)
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for one, two in zip(*map(jax.tree.leaves, (first, second)), strict=True):
        assert (one.dtype, one.weak_type) == (two.dtype, two.weak_type)


@each
def test_a_mask_masks(factory: Any) -> None:
    """A kernel decays and a bias does not, as without `inject_hyperparams`."""
    weights = params()
    zeros = jax.tree.map(jnp.zeros_like, weights)
    tx = go.inject_hyperparams(factory)(LR, rank=4, weight_decay=0.1, mask=matrices)
    plain = factory(LR, rank=4, weight_decay=0.1, mask=matrices)
    found, _ = tx.update(zeros, tx.init(weights), weights)
    expected, _ = plain.update(zeros, plain.init(weights), weights)
    assert np.any(found["kernel"])
    assert not np.any(found["bias"])
    np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-6)


@each
@pytest.mark.parametrize("array", [False, True])
def test_a_mask_called_with_the_step_is_refused(factory: Any, array: bool) -> None:
    """Nothing would decay, silently."""
    mask = (lambda tree: jnp.array(False)) if array else matrices
    tx = of_optax(factory)(LR, rank=4, weight_decay=0.1, mask=mask)
    with pytest.raises(TypeError, match=r"mask=.*galore_optax\.inject_hyperparams"):
        tx.init(params())


def test_a_dtype_called_with_the_step_is_refused() -> None:
    for factory in (go.galore_adamw, go.galore_adafactor):
        tx = of_optax(factory)(LR, rank=4, moment_dtype=jnp.bfloat16)
        with pytest.raises(TypeError, match=r"moment_dtype=.*inject_hyperparams"):
            tx.init(params())
        ours = go.inject_hyperparams(factory)(LR, rank=4, moment_dtype=jnp.bfloat16)
        assert ours.init(params()).inner_state.count == 0


def test_a_code_called_with_the_step_is_refused() -> None:
    class Callable(type(go.codes.companded())):  # type: ignore[misc]
        def __call__(self, step: Any) -> int:
            return 8

    code = Callable(None, 64)
    tx = of_optax(go.galore_adamw8bit)(LR, rank=4, code=code)
    with pytest.raises(TypeError, match=r"no code.*galore_optax\.inject_hyperparams"):
        tx.init(params())
    ours = go.inject_hyperparams(go.galore_adamw8bit)(LR, rank=4, code=code)
    moments = ours.init(params()).inner_state.inner_state[0].mu
    assert moments["bias"].codes.dtype == jnp.int8


def of_leaf(leaf: Any) -> float:
    return 0.5 if leaf.path == "kernel" else 2.0


def gap_of_leaf(leaf: Any) -> int:
    return 2 if leaf.shape[0] == 16 else 100


@each
def test_callables_of_a_leaf(factory: Any) -> None:
    static = ("scale", "update_proj_gap")
    options = {"rank": 4, "scale": of_leaf, "update_proj_gap": gap_of_leaf}
    tx, plain = (
        make(LR, **options)
        for make in (go.inject_hyperparams(factory, static), factory)
    )
    weights = params()
    states = tx.init(weights), plain.init(weights)
    updates = jax.jit(tx.update), jax.jit(plain.update)
    for step in range(3):
        grads = normal_like(weights, step)
        found, ours = updates[0](grads, states[0], weights)
        expected, theirs = updates[1](grads, states[1], weights)
        states = ours, theirs
        # f32 hyperparameters round in another order than Python's numbers.
        np.testing.assert_allclose(
            found["kernel"], expected["kernel"], rtol=2e-5, atol=1e-6
        )


@each
@pytest.mark.parametrize(
    ("name", "function"), [("scale", of_leaf), ("update_proj_gap", gap_of_leaf)]
)
def test_callables_of_a_leaf_that_are_not_named(
    factory: Any, name: str, function: Any
) -> None:
    tx = go.inject_hyperparams(factory)(LR, rank=4, **{name: function})
    with pytest.raises(TypeError, match=rf"{name} is a .* step.*static_args='{name}'"):
        tx.init(params())


def test_schedules_of_the_step() -> None:
    tx = go.inject_hyperparams(go.galore)(
        optax.sgd(1.0), rank=4, scale=lambda step: 1.0 + step, update_proj_gap=2
    )
    weights = {"w": jnp.eye(8)}
    state, sizes = tx.init(weights), []
    for _ in range(3):
        updates, state = tx.update({"w": jnp.eye(8)}, state, weights)
        sizes.append(float(jnp.linalg.norm(updates["w"])))
    np.testing.assert_allclose(sizes, np.sqrt(4) * np.arange(1, 4), rtol=1e-5)


def test_a_default_scale_is_a_hyperparameter() -> None:
    tx = go.inject_hyperparams(go.galore)(optax.adam(LR), rank=4)
    assert float(tx.init(params()).hyperparams["scale"]) == 0.25


def test_factories_of_ones_own() -> None:
    def make(rate: float, rank: int, mask: Any) -> optax.GradientTransformation:
        return go.galore_adamw(rate, rank=rank, mask=mask)

    state = go.inject_hyperparams(make)(LR, rank=4, mask=matrices).init(params())
    assert set(state.hyperparams) == {"rate"}
    with pytest.raises(ValueError, match="static_args"):
        go.inject_hyperparams(make, static_args="decay")


def test_one_default_of_weight_decay() -> None:
    weights = params()
    zeros = jax.tree.map(jnp.zeros_like, weights)
    ours = (make(LR, rank=4) for make in (go.galore_adamw, go.galore_adamw8bit))
    for tx in (optax.adamw(LR), *ours):
        updates, _ = tx.update(zeros, tx.init(weights), weights)
        np.testing.assert_allclose(
            updates["kernel"], -LR * 1e-4 * weights["kernel"], rtol=1e-5
        )


def test_arguments_are_named() -> None:
    for bad in ("bf16", 3, jnp.int8):
        with pytest.raises(TypeError, match=r"moment_dtype=.* a floating-point"):
            go.galore_adamw(LR, moment_dtype=bad)
    with pytest.raises(TypeError, match=r"mask=False must be a tree.*weight_decay=0"):
        go.galore_adamw(LR, mask=False)


@pytest.mark.parametrize(
    "make", [*READY_MADE.values(), go.galore], ids=lambda make: make.__name__
)
def test_nothing_is_projected_twice(make: Any) -> None:
    inner = optax.adam(LR) if make is go.galore else LR
    with pytest.raises(TypeError, match="projects already"):
        go.galore(make(inner))
