# SPDX-License-Identifier: Apache-2.0
"""Leaves at full size step as by the same optimizer at another learning rate.

The rates and factors are powers of two, by which a product is exact: no tolerance but
that of a product of three numbers that compilers may order as they like.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from galore_optax import layerwise
from tests.helpers import normal_like

PARAMS = normal_like(
    {
        "embedding": jnp.ones((20, 8)),
        "up": {"kernel": jnp.ones((8, 24)), "bias": jnp.ones(24)},
    },
    seed=0,
)
GRADIENTS = normal_like(PARAMS, seed=1)
RATE, LR, DECAY = 0.25, 2.0**-4, 0.5
WARMUP = optax.linear_schedule(2.0**-6, 2.0**-3, 4)

Tx = optax.GradientTransformation


def train(tx: Tx, steps: int = 3, params: Any = PARAMS) -> Any:
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        gradients = jax.tree.map(lambda g, n=step: g * (1 + n), GRADIENTS)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_same(found: Any, expected: Any) -> None:
    # Three additions to numbers of size 1, each rounded twice at most.
    np.testing.assert_allclose(found, expected, rtol=0, atol=6 * 2.0**-22)


def adamw(lr: Any) -> Tx:
    return optax.adamw(lr, weight_decay=DECAY)


SPELLINGS: dict[str, Callable[..., Tx]] = {
    "galore": lambda **given: go.galore(adamw(LR), rank=4, **given),
    "chain": lambda **given: go.chain(go.galore(rank=4, **given), adamw(LR)),
    "ready-made": lambda **given: go.galore_adamw(
        LR, weight_decay=DECAY, rank=4, **given
    ),
    "fira": lambda **given: go.fira_adamw(LR, weight_decay=DECAY, rank=4, **given),
    "apollo": lambda **given: go.apollo_adamw(LR, weight_decay=DECAY, rank=4, **given),
    "muon": lambda **given: go.galore_muon(LR, weight_decay=DECAY, rank=4, **given),
    "ldadam": lambda **given: go.ldadam(
        LR, b1=0.9, b2=0.999, weight_decay=DECAY, rank=4, **given
    ),
    "MultiSteps": lambda **given: go.MultiSteps(
        go.galore(adamw(LR), rank=4, **given), 1
    ).gradient_transformation(),
    "injected": lambda **given: go.inject_hyperparams(go.galore_adamw)(
        LR, weight_decay=DECAY, rank=4, **given
    ),
}


# Built like others.
ALIKE = "apollo", "muon", "MultiSteps"


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(x, marks=pytest.mark.slow if name in ALIKE else ())
        for name, x in SPELLINGS.items()
    ],
    ids=SPELLINGS,
)
def test_full_size_steps_as_at_another_rate(make: Callable[..., Tx]) -> None:
    plain, found = train(adamw(RATE * LR)), train(make(full_size_rate=RATE))
    assert_same(found["embedding"], plain["embedding"])
    assert_same(found["up"]["bias"], plain["up"]["bias"])
    # What is projected is what it was.
    assert_same(found["up"]["kernel"], train(make())["up"]["kernel"])
    assert not np.allclose(plain["up"]["bias"], train(adamw(LR))["up"]["bias"])


def test_under_a_schedule() -> None:
    found = train(go.galore(adamw(WARMUP), rank=4, full_size_rate=RATE))
    plain = train(adamw(lambda step: RATE * WARMUP(step)))
    assert_same(found["embedding"], plain["embedding"])
    assert_same(found["up"]["bias"], plain["up"]["bias"])


def test_adafactor_decays_at_that_rate_too() -> None:
    def make(rate: float, **given: float) -> Tx:
        return go.galore_adafactor(rate, weight_decay=DECAY, rank=4, **given)

    found, other = train(make(LR, full_size_rate=RATE), 1), train(make(RATE * LR), 1)
    assert_same(found["embedding"], other["embedding"])
    assert_same(found["up"]["kernel"], train(make(LR), 1)["up"]["kernel"])


def test_there_is_no_state() -> None:
    trees = [
        jax.eval_shape(go.galore_adamw(LR, rank=4, full_size_rate=rate).init, PARAMS)
        for rate in (None, RATE)
    ]
    assert jax.tree.structure(trees[0]) == jax.tree.structure(trees[1])


def test_without_gradients_that_are_formed() -> None:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        hidden = (x @ params["embedding"]) @ params["up"]["kernel"]
        return jnp.mean((hidden + params["up"]["bias"]) ** 2)

    x = normal_like(jnp.ones((5, 20)), seed=2)

    def updates(**given: float) -> Any:
        tx = go.galore(optax.sgd(LR), rank=4, **given)
        find = go.value_and_projected_grad(loss, tx)
        _, low, state = find(PARAMS, tx.init(PARAMS), x)
        return go.update_projected(tx, low, state, PARAMS)[0]

    plain, found = updates(), updates(full_size_rate=RATE)
    assert_same(found["embedding"], RATE * plain["embedding"])
    assert_same(found["up"]["kernel"], plain["up"]["kernel"])


def test_a_layer_at_a_time() -> None:
    model = layerwise.Model(
        embed=lambda p, batch: p["embedding"][batch],
        block=lambda p, x, batch: x + jnp.tanh(x @ p["w"] + p["bias"]),
        head=lambda p, embed, x, batch: jnp.mean(x**2),
    )
    params = layerwise.Params(
        {"embedding": normal_like(jnp.ones((20, 8)), seed=3)},
        {"w": normal_like(jnp.ones((2, 8, 8)), seed=4), "bias": jnp.zeros((2, 8))},
        {},
    )

    def moved(**given: float) -> Any:
        step = layerwise.make_step(model, go.galore(optax.sgd(LR), rank=2, **given))
        new, _, _ = step.update(params, step.init(params), jnp.arange(4)[None])
        return jax.tree.map(jnp.subtract, new, params)

    plain, found = moved(), moved(full_size_rate=RATE)
    assert_same(found.blocks["w"], plain.blocks["w"])
    assert_same(found.blocks["bias"], RATE * plain.blocks["bias"])
    assert_same(found.embed["embedding"], RATE * plain.embed["embedding"])
    assert np.any(np.asarray(plain.blocks["bias"]))


def test_it_may_follow_a_schedule() -> None:
    make = go.inject_hyperparams(go.galore)
    thaw = optax.linear_schedule(0.0, 1.0, 2)
    tx = make(optax.sgd(LR), rank=4, full_size_rate=thaw)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert not np.any(updates["embedding"])
    assert np.any(updates["up"]["kernel"])
    plain = make(optax.sgd(LR), rank=4)
    assert "full_size_rate" not in plain.init(PARAMS).hyperparams


def test_sixteen_bits_keep_their_dtype() -> None:
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = go.galore_adamw(LR, rank=4, full_size_rate=RATE)
    updates, _ = tx.update(half, tx.init(half), half)
    assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


def test_describe_tells_it() -> None:
    report = go.describe(go.galore_adamw(LR, rank=4, full_size_rate=RATE), PARAMS)
    assert {leaf.path: leaf.scale for leaf in report} == {
        "embedding": RATE,
        "up/bias": RATE,
        "up/kernel": 0.25,
    }
    assert "learning rate of their own (2 leaves): 'embedding' times 0.25" in str(
        report
    )
    assert "of their own" not in str(go.describe(go.galore_adamw(LR, rank=4), PARAMS))


def test_wrong_rates() -> None:
    for rate in (0, -1.0, float("inf")):
        with pytest.raises(ValueError, match=r"must be positive .*set_to_zero"):
            go.galore(optax.sgd(1.0), full_size_rate=rate)
    for wrong in ("half", {"embedding": 0.5}, True, lambda step: 1.0):
        with pytest.raises(TypeError, match=r"full_size_rate=.* must be a number"):
            go.galore(optax.sgd(1.0), full_size_rate=wrong)  # type: ignore[arg-type]
    alone = go.galore(rank=4, full_size_rate=RATE)
    with pytest.raises(ValueError, match=r"no effect on galore without an inner"):
        optax.chain(alone, optax.sgd(1.0)).init(PARAMS)
