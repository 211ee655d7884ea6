# SPDX-License-Identifier: Apache-2.0
"""What is arranged for XLA's CPU backend, and for no other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from tests.helpers import normal_like


def lowered(monkeypatch: pytest.MonkeyPatch, devices: int, platform: str) -> str:
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    tx = go.galore(optax.adam(1e-2), rank=4)
    gradients = normal_like({"w": jnp.ones((24, 40))}, 1)
    update = jax.jit(lambda *x: tx.update(*x, refresh=False))
    traced = update.trace(gradients, tx.init(gradients))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_it_costs_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = "optimization_barrier"
    assert mark in lowered(monkeypatch, 1, "cpu")
    assert mark not in lowered(monkeypatch, 1, "cuda")
    assert mark not in lowered(monkeypatch, 8, "cpu")


@pytest.mark.parametrize("shape", [(24, 40), (3, 24, 40), (2, 3, 4, 40)])
def test_a_projector_in_memory_by_rank_is_the_same(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    batch = 1 if len(shape) == 3 else 0
    sides = optax.contrib.MuonDimensionNumbers(
        reduction_axis=tuple(range(batch, len(shape) - 1)), output_axis=-1
    )
    tx = go.galore(optax.sgd(1.0), rank=5, weight_dimension_numbers={"w": sides})
    gradients = normal_like({"w": jnp.zeros(shape)}, 2)
    state = tx.init(gradients)

    def updates(devices: int) -> Any:
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        return jax.jit(lambda *x: tx.update(*x, refresh=False)[0])(gradients, state)

    # 24 products of entries below 5 are added up, in another order.
    found, expected = updates(1)["w"], updates(8)["w"]
    np.testing.assert_allclose(found, expected, atol=24 * 5 * 1.2e-7)
