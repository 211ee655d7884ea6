# SPDX-License-Identifier: Apache-2.0
"""What cannot be trained layer by layer, and what is said of it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import layerwise
from tests.layered import (
    MODEL,
    RATE,
    batches,
    galore,
    parameters,
)

slow = pytest.mark.slow


def skip_large(updates: Any, params: Any = None) -> Any:
    """Mixes leaves by a predicate alone."""
    large = optax.tree.norm(updates) > 1
    return jax.lax.cond(large, optax.tree.zeros_like, lambda x: x, updates)


@pytest.mark.parametrize(
    "tx",
    [
        optax.clip_by_global_norm(1.0),
        optax.stateless(skip_large),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
        galore_optax.galore(
            optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), rank=4
        ),
        optax.apply_if_finite(optax.adam(1e-3), 3),
        optax.contrib.prodigy(),
    ],
)
def test_a_transformation_that_mixes_leaves_is_refused(tx: Any) -> None:
    with pytest.raises(ValueError, match=r"several leaves at once.*'embed/embedding'"):
        layerwise.make_step(MODEL, tx).init(parameters())


@pytest.mark.parametrize(
    "tx",
    [optax.lamb(1e-3), optax.adafactor(1e-3), optax.adaptive_grad_clip(0.1)],
)
def test_a_transformation_leaf_by_leaf_is_taken(tx: Any) -> None:
    layerwise.make_step(MODEL, tx).init(parameters())


@pytest.mark.one_device
def test_large_leaves_do_not_mix() -> None:
    """As a 7B model has them; what is arranged for one device must not tie leaves."""

    def shape(*axes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *axes), jnp.float32)

    kernels = {f"w{i}": {"kernel": shape(4096, 4096)} for i in range(3)}
    blocks = kernels | {"norm": {"scale": shape(4096)}}
    shapes = jax.eval_shape(parameters)._replace(blocks=blocks)
    step = layerwise.make_step(MODEL, galore())
    jax.eval_shape(step.init, shapes)


def test_bad_models_and_batches_are_named() -> None:
    tx, params, data = optax.sgd(0.1), parameters(), batches(0, 2)
    step = layerwise.make_step(MODEL, tx, clip=layerwise.clip_by_global_norm(1.0))
    with pytest.raises(ValueError, match="with 2 micro-batches"):
        step.update(params, step.init(params), data)
    ragged = params._replace(blocks={"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))})
    with pytest.raises(ValueError, match=r"layer axis; found a \[3\], b \[4\]"):
        layerwise.make_step(MODEL, tx).init(ragged)
    whole = MODEL._replace(head=lambda params, embed, x, batch: x)
    step = layerwise.make_step(whole, tx)
    with pytest.raises(TypeError, match="scalar"):
        step.update(params, step.init(params), data)
    counted = MODEL._replace(embed=lambda params, batch: batch)
    step = layerwise.make_step(counted, tx)
    with pytest.raises(TypeError, match=r"int32.*floating-point"):
        step.update(params, step.init(params), data)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"tx=.*no optax.GradientTransformation"):
        layerwise.make_step(MODEL, optax.adam)
    with pytest.raises(TypeError, match=r"clip=1.0 is no clipping"):
        layerwise.make_step(MODEL, optax.sgd(0.1), clip=1.0)
    with pytest.raises(ValueError, match="max_norm=0 must be positive"):
        layerwise.clip_by_global_norm(0)
    layers_projected = galore_optax.galore(
        optax.sgd(0.1),
        rank=2,
        weight_dimension_numbers=galore_optax.match_paths(
            {"blocks/up": optax.contrib.MuonDimensionNumbers(0, 2), ".*": None}
        ),
    )
    step = layerwise.make_step(MODEL, layers_projected)
    with pytest.raises(ValueError, match=r"'blocks/up/kernel'.*stack of layers"):
        step.init(parameters())


@pytest.mark.parametrize("count", [1, 2])
def test_extra_arguments_reach_the_transformation(count: int) -> None:
    tx = galore_optax.galore(optax.adam(RATE), rank=4)
    step, params = layerwise.make_step(MODEL, tx), parameters()
    state = step.init(params)

    def bases(refresh: Any) -> Any:
        def update(params: Any, state: Any, batches: Any) -> Any:
            return step.update(params, state, batches, refresh=refresh)[1]

        return jax.jit(update)(params, state, batches(0, count)).blocks.projector

    kept, renewed = bases(False), bases(None)
    jax.tree.map(np.testing.assert_array_equal, kept, state.blocks.projector)
    assert not np.array_equal(*(jax.tree.leaves(x)[0] for x in (kept, renewed)))


def test_what_the_batches_of_a_step_must_be() -> None:
    tx = galore_optax.galore(optax.adam(RATE), rank=4)
    step, params = layerwise.make_step(MODEL, tx), parameters()
    state, two = step.init(params), batches(0, 2)
    with pytest.raises(ValueError, match=r"micro-batches.*\['tokens'\] \(2, 4, 9\)"):
        step.update(params, state, {"tokens": two, "mask": two[0]})
    with pytest.raises(ValueError, match="refresh=True with 2 micro-batches"):
        step.update(params, state, two, refresh=True)
