# SPDX-License-Identifier: Apache-2.0
"""Targets of matrices that every transformation has to come down on."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax as go
from tests.contract.subjects import every, params, started
from tests.helpers import normal


def minimised(tx: Any, loss: Any, weights: Any, steps: int) -> Any:
    """The parameters after `steps` steps."""

    def step(carry: Any, _: Any) -> Any:
        weights, state = carry
        updates, state = tx.update(jax.grad(loss)(weights), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps))
    return run((weights, tx.init(weights)))[0][0]


@every
def test_reduces_a_quadratic(make: Any) -> None:
    def loss(weights: Any) -> Any:
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(weights))

    weights = params()
    after = minimised(started(make).tx, loss, weights, 60)
    assert loss(after) < 0.9 * loss(weights)


@dataclasses.dataclass(frozen=True)
class Target:
    """A loss whose minimum is zero."""

    loss: Callable[[Any], Any]
    initial: Callable[[], Any]


def _wanted() -> Any:
    return {"w": normal(1, (6, 9)), "b": normal(2, (9,))}


def _parabola(weights: Any) -> Any:
    apart = jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2), weights, _wanted())
    return sum(jax.tree.leaves(apart))


def _rosenbrock(weights: Any) -> Any:
    """Optax's target, an entry of each matrix in the place of a number."""
    a, b = weights["x"], weights["y"]
    return jnp.sum((1.0 - a) ** 2 + 10.0 * (b - a**2) ** 2)


TARGETS = {
    "parabola": Target(_parabola, lambda: jax.tree.map(jnp.zeros_like, _wanted())),
    "rosenbrock": Target(
        _rosenbrock, lambda: {"x": jnp.zeros((4, 6)), "y": jnp.zeros((4, 6))}
    ),
}

RATE = optax.cosine_decay_schedule(0.1, 1500)
CONVERGING = {
    "galore(adam)": lambda: go.galore(optax.adam(RATE), **GALORE),
    "galore_adamw": lambda: go.galore_adamw(RATE, weight_decay=0.0, **GALORE),
    "galore_adamw8bit": lambda: go.galore_adamw8bit(
        RATE, weight_decay=0.0, code=go.codes.companded(min_size=16), **GALORE
    ),
    "galore_adafactor": lambda: go.galore_adafactor(RATE, **GALORE),
    "fira_adamw": lambda: go.fira_adamw(RATE, **GALORE),
    "apollo_adamw": lambda: go.apollo_adamw(RATE, **GALORE),
    "apollo_mini_adamw": lambda: go.apollo_mini_adamw(
        RATE, update_proj_gap=10, scale=1.0
    ),
    "galore_muon": lambda: go.galore_muon(RATE, weight_decay=0.0, **GALORE),
    "ldadam": lambda: go.ldadam(RATE, rank=2, scale=1.0),
}
CI_ALONE = {"apollo_adamw", "apollo_mini_adamw", "galore_muon", "ldadam"}
# One rate for all of a matrix takes longer down a valley.
SLOW = {("apollo_mini_adamw", "rosenbrock")}
ROWS = [
    pytest.param(name, target, marks=[pytest.mark.slow] * (name in CI_ALONE))
    for name in CONVERGING
    for target in TARGETS
    if (name, target) not in SLOW
]
GALORE = {"rank": 2, "update_proj_gap": 10, "scale": 1.0}


@pytest.mark.parametrize(("name", "target"), ROWS)
def test_converges(name: str, target: str) -> None:
    """From a subspace renewed every ten steps."""
    aim = TARGETS[target]
    first = aim.initial()
    found = minimised(CONVERGING[name](), aim.loss, first, 1500)
    assert aim.loss(found) < 1e-3 * aim.loss(first)
