# SPDX-License-Identifier: Apache-2.0
"""When refreshes run, what they cost when none is due, and what guards a basis."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from galore_optax import subspace
from galore_optax._asking.schedule import RETRIES
from tests.helpers import counters, normal, normal_like


class Counting:
    """A subspace method that counts, on the host, how often it really runs."""

    orthonormal = True

    def __init__(self) -> None:
        self.runs = 0

    def basis(self, gradient: Any, previous: Any, key: Any, cold: Any) -> Any:
        jax.debug.callback(self._count)
        return subspace.svd().basis(gradient, previous, key, cold)

    def _count(self) -> None:
        self.runs += 1

    def taken(self) -> int:
        jax.effects_barrier()
        runs, self.runs = self.runs, 0
        return runs


def steps(
    tx: Any, params: Any, number: int, counter: Counting, **extra: Any
) -> list[int]:
    state = tx.init(params)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, **extra))
    taken = []
    for step in range(number):
        _, state = update(normal_like(params, step), state, params)
        taken.append(counter.taken())
    return taken


MODEL = {
    "layers": {
        "up": {"kernel": jnp.ones((3, 8, 12))},
        "norm": {"scale": jnp.ones((3, 8))},
    },
    "w": jnp.ones((8, 12)),
}


def test_the_method_runs_only_when_due() -> None:
    counter = Counting()
    tx = go.galore(optax.sgd(0.1), rank=2, update_proj_gap=3, subspace=counter)
    assert steps(tx, MODEL, 7, counter) == [4, 0, 0, 4, 0, 0, 4]


def test_stagger_spreads_matrices_over_the_gap() -> None:
    counter = Counting()
    tx = go.galore(
        optax.sgd(0.1), rank=2, update_proj_gap=4, subspace=counter, stagger=True
    )
    taken = steps(tx, MODEL, 13, counter)
    assert taken[0] == 4
    assert taken[1:] == [1] * 12


def test_gap_by_leaf() -> None:
    counter = Counting()
    tx = go.galore(
        optax.sgd(0.1),
        rank=2,
        update_proj_gap=lambda leaf: 2 if leaf.path == "w" else 3,
        subspace=counter,
    )
    assert steps(tx, MODEL, 7, counter) == [4, 0, 1, 3, 1, 0, 4]


def test_accumulation_refreshes_once() -> None:
    counter = Counting()
    tx = go.galore(optax.sgd(0.1), rank=2, update_proj_gap=2, subspace=counter)
    every = go.MultiSteps(tx, 3)
    assert steps(every, {"w": jnp.ones((8, 12))}, 9, counter) == [0, 0, 1] + [0] * 5 + [
        1
    ]
    growing = go.MultiSteps(tx, lambda step: step + 1)
    assert steps(growing, {"w": jnp.ones((8, 12))}, 6, counter) == [1, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("lanes_of", ["seeds", "counts"])
def test_vmap_keeps_the_branch(lanes_of: str) -> None:
    counter = Counting()
    tx = go.galore(optax.sgd(0.1), rank=2, update_proj_gap=3, subspace=counter)
    params = {"w": normal(0, (4, 8, 12))}
    states = jax.vmap(tx.init)(params)
    singles = [tx.init({"w": params["w"][i]}) for i in range(4)]
    if lanes_of == "counts":
        # Lanes out of step: lane i has i updates behind it.
        for i in range(4):
            for step in range(i):
                grads = {"w": normal(50 + step, (8, 12))}
                _, singles[i] = tx.update(grads, singles[i])
        states = jax.tree.map(lambda *x: jnp.stack(x), *singles)
    counter.taken()
    update = jax.jit(jax.vmap(tx.update))
    taken = []
    for step in range(5):
        grads = {"w": normal(step, (4, 8, 12))}
        updates, states = update(grads, states)
        taken.append(counter.taken())
        for i in range(4):
            one, singles[i] = tx.update({"w": grads["w"][i]}, singles[i])
            counter.taken()
            np.testing.assert_allclose(updates["w"][i], one["w"], atol=2e-6)
    due = {"seeds": [True, False, False, True, False], "counts": [True, True, True] * 2}
    assert [n > 0 for n in taken] == due[lanes_of][:5]


def test_learning_rates_by_vmap() -> None:
    counter = Counting()
    params = {"w": jnp.ones((8, 12))}

    def run(rate: Any, grads: Any) -> Any:
        tx = go.galore(optax.sgd(rate), rank=2, update_proj_gap=3, subspace=counter)

        def step(state: Any, g: Any) -> Any:
            updates, state = tx.update({"w": g}, state, params)
            return state, updates["w"]

        return jax.lax.scan(step, tx.init(params), grads)[1]

    grads = normal(0, (6, 8, 12))
    rates = jnp.array([0.1, 0.2])
    both = jax.jit(jax.vmap(run, in_axes=(0, None)))(rates, grads)
    assert counter.taken() <= 2 * 2  # two refreshes, at most once for each lane
    np.testing.assert_allclose(2 * both[0], both[1], rtol=1e-5)


def entry_of(text: str) -> str:
    return text[text.index("\nENTRY ") :]


def executed(text: str) -> tuple[int, int]:
    """Conditionals and loops in the entry computation of compiled HLO."""
    entry = entry_of(text)
    return entry.count(" conditional("), entry.count(" while(")


def compiled(refresh: Any) -> str:
    tx = go.galore(optax.adamw(0.1), rank=2, stagger=True)
    state = jax.eval_shape(tx.init, MODEL)

    def update(grads: Any, state: Any, params: Any) -> Any:
        return tx.update(grads, state, params, refresh=refresh)

    return jax.jit(update).lower(MODEL, state, MODEL).compile().as_text()


@pytest.mark.optimized
def test_one_loop_of_no_turn_when_nothing_is_due() -> None:
    text = compiled(None)
    assert executed(text) == (0, 1)
    # Products of a refresh are of operands in bf16, which nothing else is here: what
    # they need of the gradient alone is not computed before the loop.
    assert "bf16" in text
    assert "bf16" not in entry_of(text)


@pytest.mark.optimized
def test_vmap_compiles_to_one_loop_and_no_select() -> None:
    tx = go.galore(optax.adam(0.1), rank=2)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), MODEL)
    state = jax.eval_shape(jax.vmap(tx.init), stacked)
    text = jax.jit(jax.vmap(tx.update)).lower(stacked, state).compile().as_text()
    assert executed(text) == (0, 1)


@pytest.mark.optimized
def test_static_false_compiles_no_refresh_code() -> None:
    text = compiled(False)
    assert executed(text) == (0, 0)
    assert "cholesky" not in text.lower()
    assert " conditional(" not in text


def test_static_true_keeps_no_old_projector() -> None:
    text = compiled(True)
    results = re.findall(r"= (.*) conditional\(", entry_of(text))
    assert all("f32" not in result for result in results)  # starts of slices alone


def test_refresh_argument() -> None:
    counter = Counting()
    params = {"w": jnp.ones((8, 12))}
    tx = go.galore(optax.sgd(0.1), rank=2, update_proj_gap=2, subspace=counter)
    assert steps(tx, params, 3, counter, refresh=False) == [0, 0, 0]
    assert steps(tx, params, 3, counter, refresh=np.True_) == [1, 1, 1]
    assert steps(tx, params, 3, counter, refresh=jnp.array(True)) == [1, 0, 1]
    assert steps(tx, params, 3, counter, refresh=jnp.array(False)) == [0, 0, 0]


def test_a_step_held_back_is_made_up_for() -> None:
    counter = Counting()
    params = {"w": jnp.ones((8, 12))}
    tx = go.galore(optax.sgd(0.1), rank=2, update_proj_gap=3, subspace=counter)
    state = tx.init(params)
    _, state = tx.update(normal_like(params, 0), state, refresh=False)
    assert counter.taken() == 0
    _, state = tx.update(normal_like(params, 1), state)
    assert counter.taken() == 1


@pytest.mark.parametrize("stagger", [False, True])
def test_host_schedule_agrees_with_the_graph(stagger: bool) -> None:
    counter, gap = Counting(), 40
    tx = go.galore(
        optax.sgd(0.1), rank=2, update_proj_gap=gap, subspace=counter, stagger=stagger
    )
    schedule = go.refresh_schedule(tx, MODEL)
    state, due = tx.init(MODEL), 0
    for step in range(2 * gap):
        owed = schedule.owed(state)
        assert schedule.due(step) or not owed
        due += schedule.due(step)
        _, state = tx.update(normal_like(MODEL, 0), state)
        assert (counter.taken() > 0) == owed
    # A refresh and its retries; staggered, the four matrices have a turn each.
    assert due == 2 * (RETRIES + 1) * (4 if stagger else 1)


def test_a_host_schedule_tries_a_refused_basis_again() -> None:
    """`up` has no gradient before `down`, which begins at zero, has made a step."""
    tx = go.galore(optax.sgd(0.1), rank=2, update_proj_gap=200)
    params = {"up": normal(0, (8, 12)), "down": jnp.zeros((12, 8))}
    schedule, state = go.refresh_schedule(tx, params), tx.init(params)
    refreshing = jax.jit(tx.update)
    steady = jax.jit(functools.partial(tx.update, refresh=False))

    def loss(params: Any) -> Any:
        return jnp.sum((normal(1, (4, 8)) @ params["up"] @ params["down"] - 1) ** 2)

    for step in range(3):
        update = refreshing if schedule.due(step) else steady
        updates, state = update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert min(counters(state.refresh.last)) >= 0
