# SPDX-License-Identifier: Apache-2.0
"""APOLLO: the gradient scaled by what a random projection tells, stored as seeds."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import galore_optax as go
from galore_optax import memory
from galore_optax._asking.held import tree_bytes
from tests.helpers import Tilted, normal, normal_like
from tests.oracles import Apollo
from tests.test_residual import (
    AXES,
    DECAY,
    GAP,
    LR,
    PARAMS,
    RATES,
    STEPS,
    WHOLE,
    gradients,
    matrices,
)

RANK = 4
OPTIONS = {"rank": RANK, "update_proj_gap": GAP, "weight_dimension_numbers": AXES}
MAKE = {"channel": go.apollo_adamw, "tensor": go.apollo_mini_adamw}
SCALES = {"channel": 1.0, "tensor": math.sqrt(128)}
GAUSSIAN = go.subspace.gaussian()


def drawn(seeds: Any, size: int) -> np.ndarray:
    """(size, rank): the basis that seeds stand for."""
    keys = [jnp.array([0, seed], jnp.uint32) for seed in np.ravel(seeds)]
    keys = [jax.random.wrap_key_data(key, impl="threefry2x32") for key in keys]
    columns = [jax.random.normal(key, (size,)) for key in keys]
    return np.stack([np.float64(x) for x in columns], 1) / math.sqrt(len(columns))


@functools.cache
def ran(granularity: str, proj_type: Any) -> tuple[list[Any], list[Any]]:
    """Parameters before each step and after the last, and the states after each."""
    options = OPTIONS | {"proj_type": proj_type}
    tx = MAKE[granularity](LR, weight_decay=DECAY, **RATES, **options)
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    found, states = [params], []
    for step in range(STEPS):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
        states.append(state[0])
    return found, states


@pytest.mark.parametrize("granularity", MAKE)
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_follows_the_formulas(granularity: str, proj_type: Any) -> None:
    found, states = ran(granularity, proj_type)
    left = proj_type == "left"
    seeds: list[Any] = []
    oracles = [
        Apollo(
            RANK,
            GAP,
            lambda G, _, number=number: drawn(seeds[number], len(G)),
            left,
            not left,
            granularity=granularity,
            scale=SCALES[granularity],
            **RATES,
        )
        for number in range(3)
    ]
    for step in range(STEPS):
        projector = states[step].projector
        seeds[:] = [projector["wide"], *projector["heads"]]
        three = (matrices(x) for x in (found[step], found[step + 1], gradients(step)))
        for oracle, W, after, G in zip(oracles, *three, strict=True):
            expected = W - LR * (oracle.direction(G) + DECAY * W)
            # Updates, to 1e-5, and what f32 rounds of the weights.
            np.testing.assert_allclose(
                after, expected, atol=1e-5 * np.max(np.abs(expected - W)) + 4 * 2**-24
            )
    assert all(3 < oracle.limits < STEPS - 3 for oracle in oracles)
    last = states[-1].residual
    norms = [float(last["wide"]), *map(float, last["heads"])]
    np.testing.assert_allclose(norms, [x.before for x in oracles], rtol=1e-4)


def test_each_basis_is_drawn_once_and_for_one_matrix() -> None:
    _, states = ran("channel", "left")
    first, same, other = (states[i].projector for i in (0, GAP - 1, GAP))
    for tree in (same, other):
        equal = jax.tree.map(lambda a, b: bool(jnp.any(a == b)), first, tree)
        assert equal == {"wide": tree is same, "heads": tree is same}
    columns = np.concatenate([np.ravel(x) for x in jax.tree.leaves(first)])
    assert len(set(columns.tolist())) == 3 * RANK


def test_a_seed_gives_one_basis_in_every_dtype_and_generator() -> None:
    seeds = jnp.arange(7, 11, dtype=jnp.uint32)
    expected = drawn(seeds, 9)
    with jax.default_prng_impl("rbg"), jax.enable_x64(True):
        for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
            found = GAUSSIAN.columns(seeds, 9, dtype)
            assert found.dtype == dtype
            eps = float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(np.float64(found), expected, rtol=eps + 2**-23)


def test_the_basis_is_the_identity_in_expectation() -> None:
    rank = 4096
    found = np.float64(GAUSSIAN.columns(jnp.arange(rank, dtype=jnp.uint32), 8, "f4"))
    # Entries of P Pᵀ have a standard deviation of at most sqrt(2 / rank).
    assert np.max(np.abs(found @ found.T - np.eye(8))) < 5 * math.sqrt(2 / rank)


def test_nothing_is_lifted() -> None:
    """One product a leaf, the one that projects."""
    tx = go.apollo_adamw(LR, **OPTIONS)
    state = jax.eval_shape(tx.init, PARAMS)
    step = functools.partial(tx.update, refresh=False)
    text = str(jax.make_jaxpr(step)(PARAMS, state, PARAMS))
    assert text.count("dot_general") == len(PARAMS)


def test_state_is_moments_and_a_seed_a_column() -> None:
    m, n, layers = 16, 40, 3
    params = {"up": jax.ShapeDtypeStruct((layers, m, n), jnp.float32)}
    axes = {"up": MuonDimensionNumbers(1, 2)}
    for make, rank in ((go.apollo_adamw, RANK), (go.apollo_mini_adamw, 1)):
        tx = make(LR, rank=rank, weight_dimension_numbers=axes)
        # 2 n r moments, r seeds, a norm, two counters of refreshes; and once for all
        # matrices a key, a count and Adam's.
        numbers = layers * (2 * n * rank + rank + 3) + 4
        assert tree_bytes(jax.eval_shape(tx.init, params)) == 4 * numbers


def test_mini_of_7b_takes_less_than_ten_megabytes() -> None:
    """In the precision that was published, and in eight bits; in f32 12.7."""
    sizes = memory.Sizes.load("7b")
    width, hidden, layers = sizes.width, sizes.hidden, sizes.layers
    shapes = {"attention": (4, width, width), "mlp": (3, width, hidden)}
    params = {
        name: jax.ShapeDtypeStruct((layers, *shape), jnp.bfloat16)
        for name, shape in shapes.items()
    }
    axes = dict.fromkeys(params, MuonDimensionNumbers(2, 3))
    options = {"weight_dimension_numbers": axes}
    numbers = layers * (2 * (4 * width + 3 * hidden) + 7 * 4) + 4

    def held(tx: Any) -> int:
        return tree_bytes(jax.eval_shape(tx.init, params))

    assert held(go.apollo_mini_adamw(LR, **options)) == 4 * numbers
    published = go.apollo_mini_adamw(LR, moment_dtype=jnp.bfloat16, **options)
    assert held(published) < 6.4e6
    eight_bits = go.galore(
        go.quantized(optax.scale_by_adam()),
        rank=1,
        subspace=GAUSSIAN,
        residual=go.residual.apollo(granularity="tensor"),
        **options,
    )
    assert held(eight_bits) < 3.5e6


def test_decay_of_the_inner_acts_on_all_of_the_weights() -> None:
    """In f32 by a number, and of what `optax.masked` hides nothing."""
    adam, rule = optax.scale_by_adam(), go.residual.apollo()
    options = OPTIONS | {"subspace": GAUSSIAN, "residual": rule}
    inside, outside = (
        go.galore(optax.chain(adam, optax.add_decayed_weights(DECAY)), **options),
        optax.chain(go.galore(adam, **options), optax.add_decayed_weights(DECAY)),
    )
    (one, _), (other, _) = (
        tx.update(gradients(0), tx.init(PARAMS), PARAMS) for tx in (inside, outside)
    )
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_sixteen_bits() -> None:
    params, grads = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), (PARAMS, gradients(0))
    )
    tx = go.apollo_adamw(1.0, subspace=Tilted(), projector_dtype=jnp.float32, **OPTIONS)
    found, state = tx.update(grads, tx.init(params), params)
    wide = jax.tree.map(jnp.float32, (params, grads))
    expected, _ = tx.update(wide[1], tx.init(wide[0]), wide[0])
    assert state[0].residual["wide"].dtype == jnp.float32
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(one), other, rtol=2 * 2**-8)


@pytest.mark.parametrize("way", WHOLE)
def test_coordinates_alone_are_refused(way: str) -> None:
    tx = go.apollo_adamw(LR, **OPTIONS)
    with pytest.raises(ValueError, match="whole gradients"):
        WHOLE[way](tx, tx.init(PARAMS))


REFUSED = {
    "a projector dtype": (
        lambda: go.apollo_adamw(LR, projector_dtype=jnp.bfloat16, **OPTIONS),
        "projector_dtype",
    ),
    "both sides": (lambda: go.apollo_adamw(LR, proj_type="full", **OPTIONS), "full"),
    "gamma": (lambda: go.apollo_adamw(LR, gamma=0.9, **OPTIONS), "gamma"),
    "granularity": (lambda: go.residual.apollo(granularity="row"), "granularity"),
    "rotation": (
        lambda: go.apollo_adamw(LR, moments=go.moments.rotate(), **OPTIONS),
        "orthonormal",
    ),
    "signs": (
        lambda: go.apollo_adamw(LR, moments=go.moments.keep(align_signs=True)),
        "signs",
    ),
    "a rate inside": (
        lambda: go.galore(
            optax.adamw(LR), residual=go.residual.apollo(), **OPTIONS
        ).init(PARAMS),
        "learning rate",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_makes_no_sense_is_refused(what: str) -> None:
    make, words = REFUSED[what]
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_a_state_with_projectors_is_named() -> None:
    tx, stored = (
        go.apollo_adamw(LR, subspace=subspace, **OPTIONS)
        for subspace in (None, Tilted())
    )
    with pytest.raises(ValueError, match="number a column"):
        jax.eval_shape(tx.update, PARAMS, stored.init(PARAMS), PARAMS)


def test_galore_on_seeds_is_galore_on_their_basis() -> None:
    """Projected, lifted and resumed by the same columns."""
    params = {"w": normal(3, (9, 14))}
    tx = go.galore(
        optax.sgd(1.0), rank=RANK, subspace=GAUSSIAN, scale=1.0, update_proj_gap=2
    )
    state = tx.init(params)
    for step in range(3):
        grads = normal_like(params, step)
        updates, state = jax.jit(tx.update)(grads, state, params)
        P = drawn(state.projector["w"], 9)
        expected = -P @ (P.T @ np.float64(grads["w"]))
        np.testing.assert_allclose(updates["w"], expected, atol=1e-5)
