# SPDX-License-Identifier: Apache-2.0
"""Hyper-parameters in the state, by Optax's `inject_hyperparams` and by ours."""

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from tests.contract.subjects import LR, assert_close, avals, params
from tests.contract.test_types import compilations
from tests.helpers import normal_like


@dataclasses.dataclass(frozen=True)
class Factory:
    """A ready-made optimizer and what its call needs."""

    make: Callable[..., optax.GradientTransformation]
    arguments: dict[str, Any]

    def plain(self, **more: Any) -> optax.GradientTransformation:
        return self.make(**self.arguments, **more)

    def injected(self, *static: str, **more: Any) -> optax.GradientTransformation:
        names = (*go.STATIC_ARGS, *static, *OWN_STATIC.get(self.make, ()))
        wrapped = optax.inject_hyperparams(self.make, static_args=names)
        return wrapped(**self.arguments, **more)


# A callable that Optax would take for a schedule; a number that bf16 would round.
OWN_STATIC = {
    go.galore_adamw8bit: ("code",),
    go.fira_adamw: ("gamma",),
    go.apollo_adamw: ("gamma",),
    go.galore_muon: ("beta", "nesterov", "ns_steps", "consistent_rms"),
    go.ldadam: ("rho", "error_feedback"),
}
LEARNING = {"learning_rate": LR, "rank": 4}
FACTORIES = {
    "galore(adam)": Factory(go.galore, {"inner": optax.adam(LR), "rank": 4}),
    "galore_adamw": Factory(go.galore_adamw, LEARNING),
    "galore_adamw8bit": Factory(
        go.galore_adamw8bit,
        LEARNING | {"code": go.codes.companded(min_size=64)},
    ),
    "galore_adafactor": Factory(go.galore_adafactor, LEARNING),
    "fira_adamw": Factory(go.fira_adamw, LEARNING),
    "apollo_adamw": Factory(go.apollo_adamw, LEARNING),
    # Each step amplifies roundings by 3.4.
    "galore_muon": Factory(go.galore_muon, LEARNING | {"ns_steps": 1}),
    "ldadam": Factory(go.ldadam, LEARNING),
}
# These take their time, and differ from the others in nothing that is tested here.
CI_ALONE = ("apollo_adamw", "ldadam", "galore_muon")


def rows(names: Iterable[str]) -> pytest.MarkDecorator:
    slow = {name: [pytest.mark.slow] * (name in CI_ALONE) for name in names}
    return pytest.mark.parametrize(
        "name", [pytest.param(x, marks=slow[x]) for x in slow]
    )


DECAYING = [
    "galore_adamw",
    "galore_adamw8bit",
    "fira_adamw",
    "apollo_adamw",
    "ldadam",
    "galore_muon",
]


def only_w(tree: Any) -> Any:
    """Which leaves decay; of the step, were it called with that, it would say none."""
    return jax.tree.map(lambda x: x.shape == (16, 8), tree)


def no_gradients(weights: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, weights)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@rows(FACTORIES)
def test_same_numbers_and_one_compilation(name: str, dtype: Any, caplog: Any) -> None:
    # In bf16 Optax would make 1 of 0.999, and divide 0 by 0.
    adam = dtype == jnp.bfloat16 and name in DECAYING
    static = ("b1", "b2", "eps") if adam else ()
    injected, plain = FACTORIES[name].injected(*static), FACTORIES[name].plain()
    weights = params(dtype)
    state, expected = injected.init(weights), plain.init(weights)
    first = avals(state)

    @jax.jit
    def the_injected(grads: Any, state: Any, weights: Any) -> Any:
        return injected.update(grads, state, weights)

    update = jax.jit(plain.update)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for step in range(3):
            grads = normal_like(weights, step)
            ours, state = the_injected(grads, state, weights)
            assert avals(state) == first
            theirs, expected = update(grads, expected, weights)
            # A rate in the state is f32 and no Python number: an ulp of the update's
            # dtype, and in eight bits a code that follows it.
            ulp = 2**-7 if dtype == jnp.bfloat16 or "8bit" in name else 1e-5
            as_f32 = jax.tree.map(lambda x: x.astype(jnp.float32), (ours, theirs))
            assert_close(*as_f32, rtol=ulp, atol=ulp * LR)
    named = [x for x in compilations(caplog) if "the_injected" in x]
    assert len(named) == 1


@rows(FACTORIES)
def test_scale_and_gap_are_hyperparameters(name: str) -> None:
    state = FACTORIES[name].injected(scale=0.25).init(params())
    assert {"scale", "update_proj_gap"} <= set(state.hyperparams)


@rows(DECAYING)
def test_a_mask_named_static_masks(name: str) -> None:
    tx = FACTORIES[name].injected("mask", weight_decay=0.1, mask=only_w)
    weights = params()
    updates, _ = jax.jit(tx.update)(no_gradients(weights), tx.init(weights), weights)
    moved = jax.tree.map(lambda x: bool(jnp.any(x != 0)), updates)
    assert moved == only_w(weights)


@rows(DECAYING)
def test_a_mask_taken_for_a_schedule_is_refused(name: str) -> None:
    """Called with the step, it would leave every leaf without decay, silently."""
    wrapped = optax.inject_hyperparams(FACTORIES[name].make, static_args=go.STATIC_ARGS)
    weights = params()

    def use() -> None:
        tx = wrapped(LR, weight_decay=0.1, mask=only_w, rank=4)
        tx.update(no_gradients(weights), tx.init(weights), weights)

    with pytest.raises(TypeError, match="mask"):
        use()


@rows(FACTORIES)
@pytest.mark.parametrize("argument", ["scale", "update_proj_gap"])
def test_per_leaf_callables_named_static(name: str, argument: str) -> None:
    values = {"scale": (1.0, 0.5), "update_proj_gap": (2, 3)}[argument]

    def per_leaf(leaf: Any) -> Any:
        return values[0] if leaf.path == "w" else values[1]

    more = {argument: per_leaf}
    injected = FACTORIES[name].injected(argument, **more)
    plain = FACTORIES[name].plain(**more)
    weights = params()
    grads = normal_like(weights, 1)
    ours, _ = jax.jit(injected.update)(grads, injected.init(weights), weights)
    theirs, _ = jax.jit(plain.update)(grads, plain.init(weights), weights)
    assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_schedules_of_scale_and_gap() -> None:
    tx = optax.inject_hyperparams(go.galore, static_args=go.STATIC_ARGS)(
        optax.sgd(1.0), rank=4, scale=lambda count: 1.0 + count, update_proj_gap=2
    )
    weights = {"w": jnp.eye(16)}
    state, sizes, update = tx.init(weights), [], jax.jit(tx.update)
    for _ in range(3):
        updates, state = update({"w": jnp.eye(16)}, state, weights)
        sizes.append(float(jnp.linalg.norm(updates["w"])))
    np.testing.assert_allclose(sizes, [2.0, 4.0, 6.0], rtol=1e-5)  # sqrt(rank) * scale


@rows(FACTORIES)
def test_ours_finds_the_static_arguments(name: str) -> None:
    factory = FACTORIES[name]
    tx = go.inject_hyperparams(factory.make)(**factory.arguments)
    weights, plain = params(), factory.plain()
    state = tx.init(weights)
    assert {"scale", "update_proj_gap"} <= set(state.hyperparams)
    grads = normal_like(weights, 1)
    ours, after = jax.jit(tx.update)(grads, state, weights)
    theirs, _ = jax.jit(plain.update)(grads, plain.init(weights), weights)
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * LR)
    assert avals(after) == avals(state)


@rows(DECAYING)
def test_ours_takes_a_mask(name: str) -> None:
    factory = FACTORIES[name]
    tx = go.inject_hyperparams(factory.make)(
        **factory.arguments, weight_decay=0.1, mask=only_w
    )
    weights = params()
    updates, _ = jax.jit(tx.update)(no_gradients(weights), tx.init(weights), weights)
    moved = jax.tree.map(lambda x: bool(jnp.any(x != 0)), updates)
    assert moved == only_w(weights)


@pytest.mark.parametrize("argument", ["scale", "update_proj_gap"])
def test_ours_names_a_per_leaf_callable_taken_for_a_schedule(argument: str) -> None:
    tx = go.inject_hyperparams(go.galore_adamw)(
        LR, rank=4, **{argument: lambda leaf: leaf.rows}
    )
    with pytest.raises(TypeError, match=argument):
        tx.init(params())
