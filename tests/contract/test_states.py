# SPDX-License-Identifier: Apache-2.0
"""What may be done with a state: labels, buffers, checkpoints; and whose it is."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax as go
from tests.contract.subjects import (
    LR,
    assert_equal,
    every,
    outermost,
    params,
    ready_made,
    started,
)
from tests.helpers import normal_like


@every
def test_map_params_changes_nothing(make: Any) -> None:
    subject = started(make)
    same = optax.tree.map_params(subject.tx, lambda x: x, subject.state)
    assert_equal(subject.state, same)


@every
def test_map_params_gives_no_projected_array_a_full_specification(make: Any) -> None:
    subject = started(make)
    specs = jax.tree.map(lambda x: x.shape, subject.weights)

    def check(leaf: Any, shape: tuple[int, ...]) -> Any:
        assert leaf.shape == shape
        return leaf

    optax.tree.map_params(
        subject.tx, check, subject.state, specs, transform_non_params=lambda x: x
    )


@pytest.mark.one_device
@every
def test_no_two_state_leaves_share_a_buffer(make: Any) -> None:
    tx, weights = make(), params()
    state = tx.init(weights)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((state, weights))]
    assert len(set(pointers)) == len(pointers)
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    _, state = step(normal_like(weights, 1), state, weights)
    step(normal_like(weights, 2), state, weights)


@every
def test_orbax_round_trip(make: Any, tmp_path: Any) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    subject = started(make)
    weights, update = subject.weights, subject.update
    _, state = update(normal_like(weights, 1), subject.state, weights)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        found = saver.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert_equal(state, found)
    grads = normal_like(weights, 2)
    assert_equal(update(grads, state, weights), update(grads, found, weights))


OTHER_STATES = {
    "a dict": lambda state: state._asdict(),
    "a tuple": tuple,
    "None": lambda state: None,
    "an array": lambda state: jnp.zeros(3),
    "of optax.adamw": lambda state: optax.adamw(LR).init(params()),
    "in a chain": lambda state: (state, optax.EmptyState()),
}


@outermost
@pytest.mark.parametrize("kind", OTHER_STATES)
def test_what_is_no_state_of_galore_is_named(make: Any, kind: str) -> None:
    """As a checkpoint restored without a target gives it, or another optimizer."""
    subject = started(make)
    other = OTHER_STATES[kind](subject.state)
    with pytest.raises((ValueError, TypeError), match="GaLoreState"):
        jax.eval_shape(subject.tx.update, subject.weights, other, subject.weights)


OTHER_INNERS = {
    "lion": lambda: go.galore(optax.lion(LR), rank=4),
    "sgd": lambda: go.galore(optax.sgd(LR), rank=4),
    "eight bits, dynamic": lambda: go.galore_adamw8bit(
        LR, rank=4, code=go.codes.dynamic(block=32, min_size=64)
    ),
    "none": lambda: go.galore(optax.identity(), rank=4),
}


@ready_made
@pytest.mark.parametrize("other", OTHER_INNERS)
def test_a_state_of_another_inner_is_named(make: Any, other: str) -> None:
    subject = started(make)
    state = OTHER_INNERS[other]().init(subject.weights)
    with pytest.raises((ValueError, TypeError), match=r"state|inner") as error:
        jax.eval_shape(subject.tx.update, subject.weights, state, subject.weights)
    message = str(error.value)
    assert "zip()" not in message
    assert "unpack" not in message
    assert "init" in message  # the remedy: a state of this transformation's own init
