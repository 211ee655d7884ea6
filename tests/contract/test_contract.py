# SPDX-License-Identifier: Apache-2.0
"""What Optax demands of its own transformations, demanded of every one of ours.

Adding a transformation is one line in `TRANSFORMATIONS`.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from tests.helpers import normal_like

LR = 0.05


def _chained() -> optax.GradientTransformation:
    return go.chain(optax.clip_by_global_norm(1.0), go.galore(rank=4), optax.adamw(LR))


TRANSFORMATIONS = {
    "galore(sgd)": lambda: go.galore(optax.sgd(LR, momentum=0.9), rank=4),
    "galore(adam)": lambda: go.galore(optax.adam(LR), rank=4, update_proj_gap=3),
    "galore(lion)": lambda: go.galore(optax.lion(LR, weight_decay=0.01), rank=4),
    "galore(lamb)": lambda: go.galore(optax.lamb(LR), rank=4),
    "galore(adam), svd": lambda: go.galore(
        optax.adam(LR), rank=4, subspace=go.subspace.svd()
    ),
    "galore(adam), eigh": lambda: go.galore(
        optax.adam(LR), rank=4, subspace=go.subspace.eigh(), proj_type="reverse_std"
    ),
    "galore(adam), randomized": lambda: go.galore(
        optax.adam(LR), rank=4, subspace=go.subspace.randomized()
    ),
    "galore(adam), random": lambda: go.galore(
        optax.adam(LR), rank=4, subspace=go.subspace.random(), stagger=True
    ),
    "galore(adam), full": lambda: go.galore(optax.adam(LR), rank=4, proj_type="full"),
    "galore(adam), int4": lambda: go.galore(
        optax.adam(LR), rank=4, projector_dtype="int4", update_proj_gap=3
    ),
    "galore_adamw": lambda: go.galore_adamw(LR, rank=4, update_proj_gap=2),
    "galore_adafactor": lambda: go.galore_adafactor(LR, rank=4, b1=0.9),
    "chain": _chained,
    "quantized(adam)": lambda: go.quantized(
        optax.adam(LR), code=go.codes.companded(min_size=64)
    ),
    "galore_adamw8bit": lambda: go.galore_adamw8bit(
        LR, rank=4, code=go.codes.dynamic(block=32, min_size=64)
    ),
}

# A row takes its time; these differ least from the others.
SLOW = {
    *("galore(sgd)", "galore(lion)", "galore(lamb)", "galore(adam), full"),
    *("galore_adamw", "quantized(adam)", "chain"),
    *(
        f"galore(adam), {name}"
        for name in ("svd", "eigh", "randomized", "random", "int4")
    ),
}

every = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, make in TRANSFORMATIONS.items()
    ],
)


def params(dtype: Any = jnp.float32) -> Any:
    shapes = {
        "embedding": (20, 8),
        "layers": {
            "up": {"kernel": (2, 8, 24), "bias": (2, 24)},
            "norm": {"scale": (2, 8)},
        },
        "w": (16, 8),
    }
    zeros = jax.tree.map(
        lambda shape: jnp.zeros(shape, dtype),
        shapes,
        is_leaf=lambda x: type(x) is tuple,
    )
    return normal_like(zeros, seed=0)


def avals(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(lambda: tree)
    )


def assert_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@every
def test_ignores_unknown_extra_arguments(make: Any) -> None:
    tx, weights = make(), params()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    grads, state = normal_like(weights, 1), tx.init(weights)
    plain = tx.update(grads, state, weights)
    assert_equal(plain, tx.update(grads, state, weights, unknown=jnp.ones(3)))


@every
def test_compiles_once(make: Any, caplog: Any) -> None:
    tx, weights = make(), params()
    state = tx.init(weights)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):

        @jax.jit
        def the_step(grads: Any, state: Any, weights: Any) -> Any:
            return tx.update(grads, state, weights)

        for _ in range(3):
            _, state = the_step(normal_like(weights, 1), state, weights)
    compiled = [
        r for r in caplog.records if "Compiling jit(the_step)" in r.getMessage()
    ]
    assert len(compiled) == 1


@every
def test_reduces_a_quadratic(make: Any) -> None:
    tx, weights = make(), params()

    def loss(weights: Any) -> Any:
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(weights))

    def step(carry: Any, _: Any) -> Any:
        weights, state = carry
        updates, state = tx.update(jax.grad(loss)(weights), state, weights)
        return (optax.apply_updates(weights, updates), state), None

    run = jax.jit(lambda c: jax.lax.scan(step, c, None, 60))
    (after, _), _ = run((weights, tx.init(weights)))
    assert loss(after) < 0.9 * loss(weights)


@every
def test_map_params_changes_nothing(make: Any) -> None:
    tx, weights = make(), params()
    state = tx.init(weights)
    assert_equal(state, optax.tree.map_params(tx, lambda x: x, state))


@every
def test_map_params_gives_no_projected_array_a_full_specification(make: Any) -> None:
    tx, weights = make(), params()
    specs = jax.tree.map(lambda x: x.shape, weights)
    state = tx.init(weights)

    def check(leaf: Any, shape: tuple[int, ...]) -> Any:
        assert leaf.shape == shape
        return leaf

    optax.tree.map_params(tx, check, state, specs, transform_non_params=lambda x: x)


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_updates_and_state_keep_their_types(make: Any, dtype: Any) -> None:
    tx, weights = make(), params(dtype)
    state = tx.init(weights)
    updates, after = jax.jit(tx.update)(normal_like(weights, 1), state, weights)
    assert avals(state) == avals(after)
    assert avals(jax.eval_shape(tx.init, weights)) == avals(state)
    same = jax.tree.map(lambda u, p: u.dtype == p.dtype, updates, weights)
    assert all(jax.tree.leaves(same))


@every
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_stable_under_cond(make: Any, dtype: Any) -> None:
    tx, weights = make(), params(dtype)
    grads, state = normal_like(weights, 1), tx.init(weights)

    def maybe(flag: Any) -> Any:
        skip = lambda: (grads, state)  # noqa: E731
        return jax.lax.cond(flag, lambda: tx.update(grads, state, weights), skip)

    _, after = jax.jit(maybe)(True)
    assert avals(after) == avals(state)


@every
def test_float64(make: Any) -> None:
    with jax.enable_x64(True):
        tx, weights = make(), params(jnp.float64)
        state = tx.init(weights)
        updates, after = jax.jit(tx.update)(normal_like(weights, 1), state, weights)
        assert avals(after) == avals(state)
        assert all(x.dtype == jnp.float64 for x in jax.tree.leaves(updates))


@every
def test_f32_params_with_bf16_gradients(make: Any) -> None:
    tx, weights = make(), params()
    state = tx.init(weights)
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), normal_like(weights, 1))
    updates, after = jax.jit(tx.update)(grads, state, weights)
    assert avals(after) == avals(state)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(updates))


@every
def test_initialises_from_shapes(make: Any) -> None:
    tx, weights = make(), params()
    shapes = jax.eval_shape(lambda: weights)
    assert_equal(tx.init(shapes), tx.init(weights))


@every
def test_multi_steps(make: Any) -> None:
    for wrapper in (optax.MultiSteps, go.MultiSteps):
        tx, weights = wrapper(make(), 2), params()
        state, update = tx.init(weights), jax.jit(tx.update)
        for step in range(4):
            updates, state = update(normal_like(weights, step), state, weights)
            moved = any(np.any(x != 0) for x in jax.tree.leaves(updates))
            assert moved == (step % 2 == 1)


@every
@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip(1.0), tx, optax.scale(0.5)),
        lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("galore", tx)),
        lambda tx: optax.masked(tx, {"embedding": False, "layers": True, "w": True}),
        lambda tx: optax.partition(
            {"low": tx, "full": optax.adam(LR)},
            {"embedding": "full", "layers": "low", "w": "low"},
        ),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.contrib.schedule_free(tx, LR),
    ],
    ids=["chain", "named_chain", "masked", "partition", "apply_if_finite", "free"],
)
def test_inside_wrappers(make: Any, wrap: Any) -> None:
    tx, weights = wrap(make()), params()
    state, update = tx.init(weights), jax.jit(tx.update)
    for step in range(3):
        updates, state = update(normal_like(weights, step), state, weights)
        weights = optax.apply_updates(weights, updates)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(weights))


@every
def test_scan_equals_a_loop(make: Any) -> None:
    tx, weights = make(), params()
    grads = jax.tree.map(
        lambda x: jnp.stack([x, 2 * x, -x, x]), normal_like(weights, 1)
    )

    def step(state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, weights)
        return state, updates

    last, stacked = jax.jit(lambda s: jax.lax.scan(step, s, grads))(tx.init(weights))
    state = tx.init(weights)
    update = jax.jit(lambda g, s: tx.update(g, s, weights))
    for i in range(4):
        updates, state = update(jax.tree.map(lambda x, i=i: x[i], grads), state)
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5),
            stacked,
            updates,
        )
    assert_equal(jax.tree.structure(last), jax.tree.structure(state))


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
def test_same_seed_same_numbers(make: Any) -> None:
    results = []
    for _ in range(2):
        tx, weights = make(), params()
        update = jax.jit(tx.update)
        results.append(update(normal_like(weights, 1), tx.init(weights), weights))
    assert_equal(*results)


@every
def test_orbax_round_trip(make: Any, tmp_path: Any) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    tx, weights = make(), params()
    update = jax.jit(tx.update)
    _, state = update(normal_like(weights, 1), tx.init(weights), weights)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        found = saver.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert_equal(state, found)
    grads = normal_like(weights, 2)
    assert_equal(update(grads, state, weights), update(grads, found, weights))


INJECTED = {
    "galore_adamw": (go.galore_adamw, {"learning_rate": LR}),
    "galore_adafactor": (go.galore_adafactor, {"learning_rate": LR}),
    "galore": (go.galore, {"inner": optax.adam(LR)}),
}


@pytest.mark.parametrize("name", INJECTED)
def test_inject_hyperparams(name: str) -> None:
    factory, arguments = INJECTED[name]
    arguments = {**arguments, "rank": 4, "update_proj_gap": 2}
    injected = optax.inject_hyperparams(factory, static_args=go.STATIC_ARGS)(
        **arguments
    )
    plain, weights = factory(**arguments), params()
    states = injected.init(weights), plain.init(weights)
    assert {"scale", "update_proj_gap"} <= set(states[0].hyperparams)
    updates = [jax.jit(injected.update), jax.jit(plain.update)]
    for step in range(4):
        grads = normal_like(weights, step)
        ours, injected_state = updates[0](grads, states[0], weights)
        theirs, plain_state = updates[1](grads, states[1], weights)
        states = injected_state, plain_state
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6),
            (ours, states[0].inner_state),
            (theirs, states[1]),
        )


def test_schedule_of_scale_and_gap_through_inject_hyperparams() -> None:
    tx = optax.inject_hyperparams(go.galore, static_args=go.STATIC_ARGS)(
        optax.sgd(1.0), rank=4, scale=lambda count: 1.0 + count, update_proj_gap=2
    )
    weights = {"w": jnp.eye(8)}
    state, sizes = tx.init(weights), []
    for _ in range(3):
        updates, state = tx.update({"w": jnp.eye(8)}, state, weights)
        sizes.append(float(jnp.linalg.norm(updates["w"])))
    np.testing.assert_allclose(sizes, [2.0, 4.0, 6.0], rtol=1e-5)  # sqrt(rank) * scale
