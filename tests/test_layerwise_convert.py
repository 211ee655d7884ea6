# SPDX-License-Identifier: Apache-2.0
"""A state of a layerwise step, converted, is one that another step goes on from."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import galore_optax as go
from galore_optax import layerwise
from tests.layered import LAYERS, MODEL, batches, parameters

CODE = go.codes.companded(min_size=64)
EPS = float(np.finfo(np.float32).eps)
PARAMS = parameters()
BATCHES = batches(1, 1)
OLD = go.galore_adamw(1e-2, rank=8)


def step_of(tx: Any) -> layerwise.Step:
    return layerwise.make_step(MODEL, tx)


@pytest.fixture(scope="module")
def state() -> Any:
    step = step_of(OLD)
    return jax.jit(step.update)(PARAMS, step.init(PARAMS), BATCHES)[1]


def kernel(state: Any, field: str) -> Any:
    """Of the layers' `up`."""
    part = state.blocks
    tree = (
        part.projector if field == "projector" else getattr(part.inner_state[0], field)
    )
    return tree.blocks["up"]["kernel"]


def goes_on(tx: Any, state: Any) -> None:
    step = step_of(tx)
    fresh = jax.eval_shape(step.init, PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(fresh)
    found = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert found == jax.tree.map(lambda x: (x.shape, x.dtype), fresh)
    params, _, report = jax.jit(step.update)(PARAMS, state, BATCHES)
    assert np.isfinite(report.loss)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(params))


def test_nothing_changes_where_nothing_differs(state: Any) -> None:
    same = go.galore_adamw(1e-2, rank=8, scale=0.5)
    found = layerwise.convert_state(state, OLD, same, jax.eval_shape(lambda: PARAMS))
    jax.tree.map(np.testing.assert_array_equal, found, state)


def test_a_lower_rank_keeps_what_leads_in_every_layer(state: Any) -> None:
    new = go.galore_adamw(1e-2, rank=4)
    found = layerwise.convert_state(state, OLD, new, PARAMS)
    for layer in range(LAYERS):
        before, after = kernel(state, "projector")[layer], kernel(found, "projector")
        np.testing.assert_array_equal(after[layer], before[:, :4])
        mu = kernel(state, "mu")[layer]
        kept = mu[:4] if mu.shape[0] == 8 else mu[:, :4]
        np.testing.assert_array_equal(kernel(found, "mu")[layer], kept)
    goes_on(new, found)


@pytest.mark.slow
def test_a_higher_rank_in_eight_bits_goes_on(state: Any) -> None:
    new = go.galore_adamw8bit(1e-2, rank=12, code=CODE)
    found = layerwise.convert_state(state, OLD, new, PARAMS)
    basis = kernel(found, "projector")
    gram = jnp.einsum("lmr,lms->lrs", basis, basis)
    # Sums of 16 products, of columns that two passes made orthonormal.
    identity = jnp.broadcast_to(jnp.eye(12), gram.shape)
    np.testing.assert_allclose(gram, identity, rtol=0, atol=100 * EPS)
    goes_on(new, found)


def test_what_cannot_be_converted_is_named(state: Any) -> None:
    only = go.match_paths({"blocks/up": True, ".*": None})
    new = go.galore_adamw(1e-2, rank=8, weight_dimension_numbers=only)
    with pytest.raises(ValueError, match=r"'blocks/down/kernel' .* old alone"):
        layerwise.convert_state(state, OLD, new, PARAMS)
