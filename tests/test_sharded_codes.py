# SPDX-License-Identifier: Apache-2.0
"""Moments in eight bits on a mesh: whole blocks on every device, the same bits."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_optax as go
from tests.helpers import normal_like
from tests.meshes import (
    ADAM,
    AUTO,
    EXPLICIT,
    LONG,
    LR,
    abstract,
    collectives,
    eight,
    galore,
    like,
    mesh_of,
    placed_on,
)

pytestmark = [eight, pytest.mark.optimized]
BOTH = pytest.mark.parametrize(
    "kind", [AUTO, pytest.param(EXPLICIT, marks=pytest.mark.slow)]
)
CODE = go.codes.companded(min_size=1)
ALL = ("fsdp", "tp")  # eight devices
# Blocks of 43, of 32 beside another axis that is split, and of 34, the last of which,
# in each of eight parts of 67, has 33.
MOMENTS = {
    "stack": ((3, 8, 1376), P(None, None, ALL)),
    "both": ((256, 48), P("fsdp", "tp")),
    "uneven": ((536, 8), P(ALL, None)),
}


@BOTH
def test_moments_take_nothing_from_other_devices(kind: AxisType) -> None:
    """Neither codes nor scales: bits are those of one device."""
    mesh = mesh_of(kind)
    zeros = {name: jnp.zeros(shape) for name, (shape, _) in MOMENTS.items()}
    lying = {name: NamedSharding(mesh, spec) for name, (_, spec) in MOMENTS.items()}
    tx = go.quantized(optax.adam(LR), code=CODE)
    update = jax.jit(tx.update)
    alone, state = tx.init(zeros), None
    with jax.set_mesh(mesh):
        params = jax.device_put(zeros, lying)
        places = go.state_shardings(tx, params)
        state = jax.jit(tx.init, out_shardings=places)(params)
        text = update.lower(params, state).compile().as_text()
        assert collectives(text) == set()
        for step in range(3):
            gradients = normal_like(zeros, step)
            _, state = update(jax.device_put(gradients, lying), state)
            _, alone = update(gradients, alone)
    assert jax.tree.map(lambda x: x.sharding, state) == places
    for name, place in lying.items():
        scales = places[0].mu[name].scales
        assert scales.is_equivalent_to(place, len(MOMENTS[name][0]))
    for ours, theirs in zip(*map(jax.tree.leaves, (state, alone)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("layout", "kind"),
    [
        ("fsdp on the kept axis", AUTO),
        ("fsdp on the kept axis", EXPLICIT),
        ("fsdp on the projected axis", AUTO),
        ("fsdp and tensor", EXPLICIT),
        ("tensor", AUTO),
    ],
)
def test_a_steady_step_sends_what_that_of_f32_does(layout: str, kind: AxisType) -> None:
    mesh = mesh_of(kind)
    params = abstract(placed_on(mesh, layout, LONG), LONG)

    def sent(inner: Any) -> set[str]:
        tx = go.sharded(galore(inner), params)

        def step(grads: Any, state: Any, params: Any) -> Any:
            updates, state = tx.update(grads, state, params, refresh=False)
            return optax.apply_updates(params, updates), state

        with jax.set_mesh(mesh):
            lowered = jax.jit(step).lower(params, like(tx, params), params)
            return collectives(lowered.compile().as_text())

    coded = go.quantized(ADAM, code=go.codes.companded(min_size=256))  # not the norm
    assert sent(coded) == sent(ADAM)
