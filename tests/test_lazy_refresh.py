# SPDX-License-Identifier: Apache-2.0
"""Bases that are kept longer where the subspace stands still."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import galore_optax as go
from tests.helpers import Tilted, normal, tilted
from tests.oracles import Adam

LR, RANK, GAP, STEPS = 0.01, 3, 2, 30
OVERLAP, MOST = 0.99, 4  # steady bases of `Tilted` are 3e-4 apart, turned ones 2e-2
RATES = {"b1": 0.9, "b2": 0.99}
PARAMS = {"wide": jnp.zeros((6, 9)), "stack": jnp.zeros((6, 2, 8))}
AXES = {"wide": MuonDimensionNumbers(1, 0), "stack": MuonDimensionNumbers(2, 0)}
LAZY = go.refresh.lazy(overlap=OVERLAP, most=MOST)


def gradients(step: int) -> Any:
    """Steady, and from a step of its own on another one, in each matrix."""

    def of(number: int, shape: tuple[int, int], turn: int) -> Any:
        before, after = (normal(2 * number + i, shape) for i in range(2))
        return (before if step < turn else after) + 0.1 * normal(100 + step, shape)

    stack = [of(1, (6, 8), 11), of(2, (6, 8), STEPS)]
    return {"wide": of(0, (6, 9), 17), "stack": jnp.stack(stack, axis=1)}


GRADIENTS = [gradients(step) for step in range(STEPS)]


@dataclasses.dataclass
class Lazy(Adam):
    """A refresh that is due after as many gaps as the last two bases have earned."""

    rest: int = 1
    last: int = -1

    def renewed(self, G: np.ndarray) -> np.ndarray:
        lattice = self.t // self.gap - self.last // self.gap
        if self.last < 0 or lattice >= self.rest:
            old, self.P = self.P, self._bases(G, self.P)
            if old is not None:
                overlap = np.sum((self.P[0].T @ old[0]) ** 2) / self.rank
                self.rest = min(2 * self.rest, MOST) if overlap >= OVERLAP else 1
            self.last = self.t
        return self._project(G)


def make(**chosen: Any) -> Any:
    options = {"rank": RANK, "update_proj_gap": GAP, "subspace": Tilted()} | chosen
    options = {"weight_dimension_numbers": AXES, "refresh": LAZY} | options
    return go.galore(optax.adam(LR, **RATES), **options)


@functools.cache
def ran() -> Any:
    """The updates of each step, and what was known of refreshes after it."""
    tx = make()

    def step(state: Any, gradient: Any) -> Any:
        updates, state = tx.update(gradient, state, PARAMS)
        return state, (updates, state.refresh)

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADIENTS)
    return jax.jit(lambda s, g: jax.lax.scan(step, s, g))(tx.init(PARAMS), stacked)[1]


def three(tree: Any) -> list[Any]:
    stack = np.float64(tree["stack"])
    return [np.float64(tree["wide"]), stack[..., 0, :], stack[..., 1, :]]


def counters(tree: Any) -> list[int]:
    return [int(tree["wide"]), *map(int, tree["stack"])]


def test_follows_the_formulas() -> None:
    updates, refresh = ran()
    oracles = [Lazy(RANK, GAP, tilted, **RATES) for _ in range(3)]
    lasts, rests = set(), set()
    for step, gradient in enumerate(GRADIENTS):
        found, last, rest = (
            jax.tree.map(lambda x, step=step: x[step], tree)
            for tree in (updates, refresh.last, refresh.rest)
        )
        for oracle, one, G in zip(oracles, three(found), three(gradient), strict=True):
            expected = -LR * oracle.direction(G)
            error = np.linalg.norm(one - expected) / np.linalg.norm(expected)
            assert error < 1e-5, step
        assert counters(last) == [x.last for x in oracles]
        assert counters(rest) == [x.rest for x in oracles]
        lasts.add(tuple(counters(last)))
        rests.add(tuple(counters(rest)))
    # Every matrix decided for itself, rested long, and was woken.
    assert any(len(set(x)) > 1 for x in rests)
    assert {MOST} < {x[0] for x in rests}
    assert len({x[2] for x in lasts}) < len({x[0] for x in lasts}) < STEPS / GAP


def test_without_a_rule_there_is_nothing_in_the_state() -> None:
    assert make(refresh=None).init(PARAMS).refresh.rest == ()


def test_the_host_knows_what_is_owed() -> None:
    tx = make()
    schedule, update = go.refresh_schedule(tx, PARAMS), jax.jit(tx.update)
    state = tx.init(PARAMS)
    for gradient in GRADIENTS[:12]:
        owed, before = schedule.owed(state), state.refresh.last
        assert schedule.due(int(state.count)) or not owed
        _, state = update(gradient, state, PARAMS)
        assert owed == (counters(before) != counters(state.refresh.last))


def test_gradients_never_formed_rest_as_long() -> None:
    power = go.subspace.power(product_dtype=jnp.float32)
    rule = go.refresh.lazy(overlap=0.5)
    tx = make(subspace=power, update_proj_gap=1, refresh=rule)

    def loss(params: Any, gradient: Any) -> Any:
        products = jax.tree.map(
            lambda w, g: jnp.sum(jnp.tensordot(jnp.eye(6), w, 1) * g), params, gradient
        )
        return sum(jax.tree.leaves(products))

    @jax.jit
    def never(state: Any, gradient: Any) -> Any:
        _, low, state = go.value_and_projected_grad(loss, tx)(PARAMS, state, gradient)
        return go.update_projected(tx, low, state, PARAMS)[1]

    @jax.jit
    def formed(state: Any, gradient: Any) -> Any:
        whole = jax.grad(loss)(PARAMS, gradient)
        return tx.update(whole, state, PARAMS)[1]

    one = other = tx.init(PARAMS)
    for gradient in GRADIENTS[:8]:
        one, other = formed(one, gradient), never(other, gradient)
        assert counters(one.refresh.rest) == counters(other.refresh.rest)
        assert counters(one.refresh.last) == counters(other.refresh.last)
    assert max(counters(one.refresh.rest)) > 1


REFUSED = {
    "no rule": (lambda: make(refresh=go.refresh.lazy), "refresh"),
    "a basis that is not orthonormal": (
        lambda: make(subspace=go.subspace.gaussian()),
        "orthonormal",
    ),
    "an overlap": (lambda: go.refresh.lazy(overlap=1.5), "overlap"),
    "no rest": (lambda: go.refresh.lazy(most=0), "most"),
    "a state without": (
        lambda: make().update(PARAMS, make(refresh=None).init(PARAMS), PARAMS),
        "refresh",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused(what: str) -> None:
    make_it, words = REFUSED[what]
    with pytest.raises((ValueError, TypeError), match=words):
        make_it()
