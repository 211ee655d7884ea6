# SPDX-License-Identifier: Apache-2.0
"""On one CPU device, matrices are lifted in turn instead of all at once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from galore_optax import _run
from tests.helpers import normal_like

COUNT, SIZE = 16, 256
ONE = SIZE * SIZE * 4  # bytes of a matrix
TX = go.galore(optax.adam(1e-2), rank=4)


def trees() -> tuple[Any, Any, Any]:
    params = {f"w{i:02}": jnp.ones((SIZE, SIZE)) for i in range(COUNT)}
    return params, TX.init(params), normal_like(params, 1)


def step(params: Any, state: Any, gradients: Any) -> Any:
    updates, state = TX.update(gradients, state, params, refresh=False)
    return optax.apply_updates(params, updates), state


def lowered(monkeypatch: pytest.MonkeyPatch, devices: int, platform: str) -> Any:
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(_run, "IN_FLIGHT_BYTES", 2 * ONE)
    traced = jax.jit(lambda *x: step(*x), donate_argnums=(0, 1)).trace(*trees())
    return traced.lower(lowering_platforms=(platform,))


def test_the_updates_of_all_matrices_are_never_held_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = lowered(monkeypatch, 1, "cpu").compile()
    held = compiled.memory_analysis().temp_size_in_bytes
    # Two wait, one is being lifted, one applied; coordinates are SIZE / 4 times less.
    assert held < COUNT * ONE / 2


def test_the_order_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lowered(monkeypatch, 1, "cpu").compile()(*trees())
    expected = lowered(monkeypatch, 8, "cpu").compile()(*trees())
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_it_costs_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = "count_leading_zeros"
    assert mark in lowered(monkeypatch, 1, "cpu").as_text()
    assert mark not in lowered(monkeypatch, 1, "cuda").as_text()
    assert mark not in lowered(monkeypatch, 8, "cpu").as_text()
