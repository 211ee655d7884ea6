# SPDX-License-Identifier: Apache-2.0
"""The state inside an `nnx.Optimizer`: watched, converted, updated in coordinates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import galore_optax as go

TX = go.galore(optax.adamw(1e-2), rank=4)


class Trained:
    """After one step; kernels projected on either side, one of them square."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.model = nnx.List(
            [nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)]
        )
        self.model.append(nnx.Linear(8, 8, rngs=rngs))
        self.optimizer = nnx.Optimizer(self.model, TX, wrt=nnx.Param)
        self.grads = nnx.grad(loss)(self.model)
        self.optimizer.update(self.model, self.grads)

    @property
    def params(self) -> Any:
        return nnx.as_pure(nnx.state(self.model, nnx.Param))

    @property
    def state(self) -> Any:
        return nnx.as_pure(self.optimizer.opt_state)


def loss(model: Any) -> Any:
    x = jnp.linspace(-1, 1, 32).reshape(4, 8)
    for layer in model:
        x = jnp.tanh(layer(x))
    return jnp.mean((x - 1) ** 2)


def test_it_is_watched_as_it_is() -> None:
    run = Trained()
    for ask in (go.captured_energy, go.metrics):
        found = ask(TX, run.optimizer.opt_state, run.grads)
        expected = ask(TX, run.state, nnx.as_pure(run.grads))
        assert found.keys() == expected.keys()
        for name in found:
            np.testing.assert_array_equal(found[name], expected[name])


def test_coordinates_take_pure_states() -> None:
    run, plain = Trained(), Trained()
    plain.optimizer.update(plain.model, plain.grads)
    with pytest.raises(ValueError, match=r"nnx\.as_pure\(optimizer\.opt_state\)"):
        go.project_gradients(TX, run.grads, run.optimizer.opt_state, run.params)
    grads = nnx.as_pure(run.grads)
    low, state = go.project_gradients(TX, grads, run.state, run.params)
    updates, state = go.update_projected(TX, low, state, run.params)
    nnx.update(run.optimizer.opt_state, nnx.state(state))
    nnx.update(run.model, optax.apply_updates(run.params, updates))
    for x, y in zip(
        map(jax.tree.leaves, (run.params, run.state)),
        map(jax.tree.leaves, (plain.params, plain.state)),
        strict=True,
    ):
        for one, other in zip(x, y, strict=True):
            # Two programs for the same few sums.
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_another_rank_in_the_middle_of_a_run() -> None:
    run, new = Trained(), go.galore(optax.adamw(1e-2), rank=2)
    converted = go.convert_state(run.state, TX, new, run.params)
    optimizer = nnx.Optimizer(run.model, new, wrt=nnx.Param)
    nnx.update(optimizer.opt_state, nnx.state(converted))
    optimizer.update(run.model, run.grads)
    assert int(optimizer.opt_state.count[...]) == 2
    assert nnx.as_pure(optimizer.opt_state).projector[0]["kernel"].shape == (8, 2)
