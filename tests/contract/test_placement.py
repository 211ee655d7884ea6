# SPDX-License-Identifier: Apache-2.0
"""State lies where its parameters lie, on a mesh of eight devices."""

from typing import Any

import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.contract.subjects import LR, READY_MADE, assert_close, ready_made, started
from tests.helpers import normal_like

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

SPECS = {
    "embedding": P("x", "y"),
    "layers": {
        "up": {"kernel": P(None, "x", "y"), "bias": P(None, "y")},
        "norm": {"scale": P(None, "x")},
    },
    "w": P("y", "x"),
}
KINDS = [AxisType.Auto, AxisType.Explicit]


def on_a_mesh(tree: Any, kind: AxisType) -> Any:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec),
        SPECS,
        is_leaf=lambda x: isinstance(x, P),
    )
    return mesh, jax.device_put(tree, shardings)


def specs(tree: Any) -> Any:
    """The mesh axis of every axis of every leaf."""

    def spec(x: Any) -> tuple[Any, ...]:
        found = tuple(x.sharding.spec)
        return found + (None,) * (x.ndim - len(found))

    return jax.tree.map(spec, tree)


@ready_made
@pytest.mark.parametrize("kind", KINDS)
def test_a_leaf_at_full_size_keeps_its_axes_in_the_state(
    make: Any, kind: AxisType
) -> None:
    subject = started(make)
    mesh, weights = on_a_mesh(subject.weights, kind)
    with jax.set_mesh(mesh):
        state = subject.tx.init(weights)
    wanted = {("embedding",): ("x", "y"), ("layers", "norm", "scale"): (None, "x")}
    seen = set()
    for path, leaf in jax.tree.leaves_with_path(state):
        named = tuple(key.key for key in path if hasattr(key, "key"))
        # Those of a part of the inner come after its label.
        keys = next((keys for keys in wanted if named[-len(keys) :] == keys), None)
        if keys and leaf.shape == pick(weights, keys).shape:
            assert specs(leaf) == wanted[keys]
            seen.add(keys)
    assert seen == set(wanted)


def pick(tree: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


@ready_made
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_keeps_every_placement(make: Any, kind: AxisType) -> None:
    if kind is AxisType.Explicit and make is READY_MADE["galore_muon"]:
        pytest.skip("Optax' Muon multiplies what is split there, and JAX refuses it")
    subject = started(make)
    mesh, weights = on_a_mesh(subject.weights, kind)
    with jax.set_mesh(mesh):
        state = subject.tx.init(weights)
        _, grads = on_a_mesh(normal_like(subject.weights, 1), kind)
        updates, after = jax.jit(subject.tx.update)(grads, state, weights)
    assert specs(updates) == specs(weights)
    if kind is AxisType.Explicit:  # elsewhere XLA chooses, unless it is told
        assert specs(after) == specs(state)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != "galore_adamw8bit"))
        for name in READY_MADE
    ],
)
def test_the_numbers_are_those_of_one_device(name: str) -> None:
    subject = started(READY_MADE[name])
    mesh, weights = on_a_mesh(subject.weights, AxisType.Auto)
    state, update = subject.tx.init(weights), jax.jit(subject.tx.update)
    plain = subject.state
    for number in range(3):
        grads = normal_like(subject.weights, number)
        updates, state = update(on_a_mesh(grads, AxisType.Auto)[1], state, weights)
        expected, plain = subject.update(grads, plain, subject.weights)
        # Sums over devices differ by ulps; one code of eight bits may follow them.
        assert_close(jax.device_get(updates), expected, atol=LR / 127)
    assert mesh.size == 8
