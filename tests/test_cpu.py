# SPDX-License-Identifier: Apache-2.0
"""What is arranged for XLA's CPU backend with one device, and for no other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from galore_optax._xla import order as _order
from tests.helpers import normal_like

pytestmark = [pytest.mark.one_device, pytest.mark.optimized]
alone = pytest.mark.skipif(jax.device_count() > 1, reason="needs a single device")

COUNT, SIZE, WIDE = 16, 256, 264  # the shorter axis comes first
ONE = SIZE * WIDE * 4  # bytes of a matrix
TX = go.galore(optax.adam(1e-2), rank=4)


def trees() -> tuple[Any, Any, Any]:
    params = {f"w{i:02}": jnp.ones((SIZE, WIDE)) for i in range(COUNT)}
    return params, TX.init(params), normal_like(params, 1)


def step(params: Any, state: Any, gradients: Any) -> Any:
    updates, state = TX.update(gradients, state, params, refresh=False)
    return optax.apply_updates(params, updates), state


def lowered(
    monkeypatch: pytest.MonkeyPatch, platform: str, in_flight: int = 2 * ONE
) -> Any:
    monkeypatch.setattr(_order, "IN_FLIGHT_BYTES", in_flight)
    traced = jax.jit(lambda *x: step(*x), donate_argnums=(0, 1)).trace(*trees())
    return traced.lower(lowering_platforms=(platform,))


@alone
def test_the_updates_of_all_matrices_are_never_held_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = lowered(monkeypatch, "cpu").compile()
    held = compiled.memory_analysis().temp_size_in_bytes
    # Two wait, one is being lifted, one applied; coordinates are SIZE / 4 times less.
    assert held < COUNT * ONE / 2


@alone
def test_the_order_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lowered(monkeypatch, "cpu").compile()(*trees())
    at_once = lowered(monkeypatch, "cpu", in_flight=2**40)
    expected = at_once.compile()(*trees())
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("mark", ["count_leading_zeros", "optimization_barrier"])
def test_it_costs_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch, mark: str) -> None:
    assert mark in lowered(monkeypatch, "cpu").as_text()
    assert mark not in lowered(monkeypatch, "cuda").as_text()


@pytest.mark.parametrize("shape", [(24, 40), (3, 24, 40), (2, 3, 4, 40)])
def test_a_projector_in_memory_by_rank_is_the_same(shape: tuple[int, ...]) -> None:
    batch = 1 if len(shape) == 3 else 0
    sides = optax.contrib.MuonDimensionNumbers(
        reduction_axis=tuple(range(batch, len(shape) - 1)), output_axis=-1
    )
    tx = go.galore(
        optax.sgd(1.0), rank=5, scale=1.0, weight_dimension_numbers={"w": sides}
    )
    gradients = normal_like({"w": jnp.zeros(shape)}, 2)
    state = tx.init(gradients)
    found, _ = jax.jit(lambda *x: tx.update(*x, refresh=False))(gradients, state)
    matrices = (*shape[:batch], -1)
    g = np.asarray(gradients["w"], np.float64).reshape(*matrices, 40)
    p = np.asarray(state.projector["w"], np.float64).reshape(*matrices, 5)
    expected = -p @ (np.swapaxes(p, -1, -2) @ g)
    # 24 products of entries below 5 are added up, in another order.
    np.testing.assert_allclose(
        found["w"], expected.reshape(shape), atol=24 * 5 * 1.2e-7
    )
