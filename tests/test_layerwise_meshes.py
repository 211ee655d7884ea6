# SPDX-License-Identifier: Apache-2.0
"""A layer at a time on eight devices: the numbers of one, the state split too."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import galore_optax as go
from galore_optax import layerwise
from tests.layered import MODEL, batches, parameters
from tests.meshes import AUTO, EIGHT_BIT, EXPLICIT, LR, eight, galore

pytestmark = eight
STEPS = 6  # of which two refresh

# std projects the shorter axis of every kernel, 16: the other one is kept.
KEPT = layerwise.Params(
    embed={"embedding": P(None, "fsdp")},
    blocks={
        "up": {"kernel": P(None, None, "fsdp")},
        "down": {"kernel": P(None, "fsdp")},
        "norm": {"scale": P(None, "fsdp")},
    },
    head={"lm_head": {"kernel": P("fsdp")}},
)
WHOLE = jax.tree.map(lambda _: P(), KEPT, is_leaf=lambda x: isinstance(x, P))
LAYOUTS = {
    "data": (WHOLE, P(None, "fsdp")),
    "fsdp": (KEPT, P()),
    "both": (KEPT, P(None, "data")),
}


def placed(specs: Any, kind: Any = AUTO) -> Any:
    mesh = jax.make_mesh((4, 2), ("fsdp", "data"), axis_types=(kind,) * 2)
    is_spec = {"is_leaf": lambda x: isinstance(x, P)}
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, **is_spec)


def trained(step: layerwise.Step, params: Any, over: Any, count: int) -> Any:
    """Parameters and state, after as many compilations as there should be."""
    update, state = jax.jit(step.update), step.init(params)
    for number in range(STEPS):
        data = batches(number, count)
        data = data if over is None else jax.device_put(data, over)
        params, state, _ = update(params, state, data)
    assert update._cache_size() == 1
    return params, state


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("layout", "count", "inner"),
    [
        ("both", 1, None),
        pytest.param("data", 2, None, marks=SLOW),
        pytest.param("fsdp", 1, EIGHT_BIT, marks=SLOW),
        pytest.param("both", 2, None, marks=SLOW),
        pytest.param("fsdp", 1, None, marks=SLOW),
    ],
)
def test_a_mesh_trains_as_one_device_does(layout: str, count: int, inner: Any) -> None:
    specs, of_batch = LAYOUTS[layout]
    places = placed(specs)
    tx = galore() if inner is None else galore(inner)
    params = jax.device_put(parameters(), places)
    step = layerwise.make_step(MODEL, go.sharded(tx, params))
    found, state = trained(step, params, placed(of_batch), count)
    alone, _ = trained(layerwise.make_step(MODEL, tx), parameters(), None, count)
    # As in `tests/test_sharded.py`: sums in another order, and codes that follow them.
    tolerance = 5e-5 if inner is None else LR / 127
    for ours, theirs in zip(*map(jax.tree.leaves, (found, alone)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
    for x, place in zip(*map(jax.tree.leaves, (found, places)), strict=True):
        assert x.sharding == place
    assert_split_like(state, specs)


def assert_split_like(state: Any, specs: Any) -> None:
    """No more of it on a device than there has to be."""
    moment, basis = state.blocks.inner_state[0].mu.blocks, state.blocks.projector.blocks
    if specs is WHOLE:
        assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(state))
        return
    (codes, *_) = jax.tree.leaves(moment["up"]["kernel"])
    assert codes.sharding.spec == P(None, None, "fsdp")
    for name in ("up", "down"):
        assert basis[name]["kernel"].sharding.spec == P(None, "fsdp")


def test_without_a_declaration_numbers_are_the_same() -> None:
    places = placed(KEPT)
    params = jax.device_put(parameters(), places)
    step = layerwise.make_step(MODEL, galore())
    state, update = step.init(params), jax.jit(step.update)
    data = batches(0, 1)
    found, _, _ = update(params, state, jax.device_put(data, placed(P(None, "data"))))
    alone, _, _ = update(parameters(), step.init(parameters()), data)
    for ours, theirs in zip(*map(jax.tree.leaves, (found, alone)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-5)


SPLIT = KEPT._replace(blocks=KEPT.blocks | {"up": {"kernel": P("data")}})
REFUSED = r"axis 0 of 'blocks/up/kernel', its 4 layers, .* 'data'.*PartitionSpec\(None"


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_stacks_split_along_layers_are_refused(kind: Any) -> None:
    params = jax.device_put(parameters(4), placed(SPLIT, kind))
    with pytest.raises(ValueError, match=REFUSED):
        layerwise.make_step(MODEL, go.sharded(galore(), params))
    step = layerwise.make_step(MODEL, galore())
    with pytest.raises(ValueError, match=REFUSED):
        step.init(params)
    state = jax.eval_shape(step.init, parameters(4))
    with pytest.raises(ValueError, match=REFUSED):
        step.update(params, state, batches(0, 1))
    if kind is EXPLICIT:  # where a tracer knows too
        with pytest.raises(ValueError, match=REFUSED):
            jax.jit(step.init)(params)


def test_other_parameters_than_declared_are_refused() -> None:
    params = jax.device_put(parameters(), placed(KEPT))
    as_dict = jax.device_put({"w": jnp.ones((16, 64))}, placed(P()))
    with pytest.raises(ValueError, match=r"in a dict.*layerwise\.Params"):
        layerwise.make_step(MODEL, go.sharded(galore(), as_dict))
    step = layerwise.make_step(MODEL, go.sharded(galore(), params))
    with pytest.raises(ValueError, match=r"'blocks/down/kernel' is \(3, 24, 16\)"):
        step.init(parameters(2))
