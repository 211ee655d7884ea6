# SPDX-License-Identifier: Apache-2.0
"""What users see: spellings, shapes, bytes, dtypes, leaves, frameworks."""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optax.contrib import GaLoreDimensionNumbers, MuonDimensionNumbers

import galore_optax as go
from tests.helpers import Tilted, normal, normal_like, orthonormality

LR = 0.1
PARAMS = {
    "embedding": jnp.ones((40, 16)),
    "layers": {
        "up": {"kernel": normal(0, (3, 16, 48)), "bias": jnp.ones((3, 48))},
        "norm": {"scale": jnp.ones((3, 16))},
    },
    "w": normal(1, (24, 16)),
}


def bytes_of(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def run(tx: Any, params: Any, number: int = 4) -> Any:
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(number):
        updates, state = update(normal_like(params, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_close(a: Any, b: Any, **kwargs: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **kwargs), a, b)


def test_three_spellings() -> None:
    inner = go.galore(optax.adamw(LR), rank=4)
    chained = go.chain(go.galore(rank=4), optax.adamw(LR))
    assert_close(run(inner, PARAMS)[0], run(chained, PARAMS)[0])
    assert bytes_of(inner.init(PARAMS)) == bytes_of(chained.init(PARAMS))
    plain = optax.chain(go.galore(rank=4), optax.adamw(LR))
    with pytest.warns(
        UserWarning, match=r"saved\. Write galore\(.*galore_optax\.chain"
    ):
        state = plain.init(PARAMS)
    assert bytes_of(state) > bytes_of(optax.adamw(LR).init(PARAMS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # only once
        run(plain, PARAMS)


def test_filter_is_the_orthogonal_projection() -> None:
    with pytest.warns(UserWarning, match="only filters gradients"):
        state = (tx := go.galore(rank=4)).init({"w": PARAMS["w"]})
    updates, state = tx.update({"w": PARAMS["w"]}, state)
    p = state.projector["w"]
    np.testing.assert_allclose(updates["w"], PARAMS["w"] @ p @ p.T, atol=1e-5)


def test_chain_puts_what_follows_inside() -> None:
    clip = optax.clip_by_global_norm(0.5)
    ours = go.chain(clip, go.galore(rank=4), optax.scale_by_adam(), optax.scale(-LR))
    inner = optax.chain(optax.scale_by_adam(), optax.scale(-LR))
    theirs = optax.chain(clip, go.galore(inner, rank=4))
    assert_close(run(ours, PARAMS)[0], run(theirs, PARAMS)[0])
    assert go.chain(clip, optax.adam(LR)).init(PARAMS) is not None


def test_update_lies_in_the_span() -> None:
    tx = go.galore(optax.adam(LR), rank=3)
    updates, state = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    for update, p in (
        (updates["w"], state.projector["w"]),
        (
            updates["layers"]["up"]["kernel"].mT,
            state.projector["layers"]["up"]["kernel"],
        ),
    ):
        np.testing.assert_allclose(update @ p @ p.mT, update, atol=1e-6)
        assert np.linalg.matrix_rank(update, tol=1e-4).max() == 3


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_state_bytes_are_those_of_the_formula(proj_type: str) -> None:
    m, n, r = 24, 16, 4
    tx = go.galore(optax.adam(LR), rank=r, proj_type=proj_type)
    state = tx.init({"w": jnp.ones((m, n))})
    elements = {
        "std": n * r + 2 * m * r,  # tall: the columns are projected
        "reverse_std": m * r + 2 * n * r,
        "left": m * r + 2 * n * r,
        "right": n * r + 2 * m * r,
        "full": (m + n) * r + 2 * r * r,
    }[proj_type]
    counters = 4 + 8 + 4 + 4 + 4  # count, key, last, refused, Adam's count
    assert bytes_of(state) == 4 * elements + counters


def test_stacked_layers_equal_separate_ones() -> None:
    shapes = {"up": (3, 16, 48), "down": (3, 48, 16)}
    stack = {k: {"kernel": normal(i, s)} for i, (k, s) in enumerate(shapes.items())}
    stack["norm"] = {"scale": jnp.ones((3, 16))}
    apart = {f"layer{i}": jax.tree.map(lambda x, i=i: x[i], stack) for i in range(3)}
    for make in (
        lambda: go.galore_adamw(LR, rank=4, subspace=Tilted(), update_proj_gap=2),
        lambda: go.galore_adafactor(LR, rank=4, subspace=Tilted(), b1=0.9),
    ):
        tx_a, tx_b = make(), make()
        state_a, state_b = tx_a.init({"layers": stack}), tx_b.init(apart)
        a, b = {"layers": stack}, apart
        update_a, update_b = jax.jit(tx_a.update), jax.jit(tx_b.update)
        for step in range(4):
            grads = normal_like(stack, step)
            each = {
                f"layer{i}": jax.tree.map(lambda x, i=i: x[i], grads) for i in range(3)
            }
            u, state_a = update_a({"layers": grads}, state_a, a)
            v, state_b = update_b(each, state_b, b)
            a, b = optax.apply_updates(a, u), optax.apply_updates(b, v)
        for i in range(3):
            for name in shapes:
                got = a["layers"][name]["kernel"][i]
                want = b[f"layer{i}"][name]["kernel"]
                # Adam turns an ulp of a small coordinate into some of its update.
                np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jnp.clip's, in contrib
def test_contrib_is_a_setting() -> None:
    shapes = {"embedding": (64, 16), "kernel": (16, 48), "square": (16, 16)}
    params = {name: normal(i, shape) for i, (name, shape) in enumerate(shapes.items())}
    ours = go.galore(
        optax.adam(LR),
        rank=4,
        scale=1.0,
        proj_type="reverse_std",
        subspace=go.subspace.svd(),
        weight_dimension_numbers=MuonDimensionNumbers(reduction_axis=1, output_axis=0),
    )
    theirs = optax.contrib.galore(LR, rank=4)
    one, two = ours.init(params), theirs.init(params)
    for step in range(3):  # signs of later bases are free, and moments depend on them
        gradients = normal_like(params, step)
        updates, one = jax.jit(ours.update)(gradients, one, params)
        expected, two = jax.jit(theirs.update)(gradients, two, params)
        for name in shapes:
            # Adam turns an ulp of a small coordinate into some of its update.
            np.testing.assert_allclose(updates[name], expected[name], atol=1e-2 * LR)


@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_batch_axes_anywhere(data: Any) -> None:
    sizes = data.draw(st.permutations([3, 4, 6, 8]))
    axes = data.draw(st.permutations(range(4)))[:2]
    spec = MuonDimensionNumbers(reduction_axis=axes[0], output_axis=axes[1])
    x = normal(0, tuple(sizes))
    options = {"scale": 1.0, "weight_dimension_numbers": spec}
    tx = go.galore(optax.sgd(1.0), rank=2, subspace=Tilted(), **options)
    updates, state = jax.jit(tx.update)({"x": x}, tx.init({"x": x}))
    moved = np.moveaxis(np.asarray(x), axes, (-1, -2))  # (..., out, in)
    ours = np.moveaxis(np.asarray(updates["x"]), axes, (-1, -2))
    tall = moved.shape[-2] >= moved.shape[-1]
    # P is (batch, projected, rank): project and lift by hand, matrix by matrix.
    p = np.asarray(state.projector["x"])
    view = np.swapaxes(moved, -1, -2) if tall else moved
    expected = -p @ (np.swapaxes(p, -1, -2) @ view)
    expected = np.swapaxes(expected, -1, -2) if tall else expected
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert orthonormality(p) < 1e-5


def test_attention_kernels_as_matrices() -> None:
    kernel = normal(0, (16, 4, 8))  # (in, heads, size)
    params = {"query": {"kernel": kernel}, "w": jnp.ones((8, 8))}
    tx = go.galore(optax.sgd(1.0), rank=3, scale=1.0, subspace=go.subspace.svd())
    updates, state = tx.update(params, tx.init(params))
    assert state.projector["query"]["kernel"].shape == (16, 3)
    u, s, vt = np.linalg.svd(np.asarray(kernel).reshape(16, 32), full_matrices=False)
    best = ((u[:, :3] * s[:3]) @ vt[:3]).reshape(16, 4, 8)
    np.testing.assert_allclose(-updates["query"]["kernel"], best, atol=1e-4)


@pytest.mark.parametrize("kind", [MuonDimensionNumbers, GaLoreDimensionNumbers])
def test_dimension_numbers(kind: Any) -> None:
    params = {"a": jnp.ones((6, 8, 10)), "b": jnp.ones((6, 8)), "c": jnp.ones(4)}
    spec = kind(reduction_axis=0, output_axis=1)

    def shapes(numbers: Any) -> Any:
        tx = go.galore(optax.sgd(1.0), rank=2, weight_dimension_numbers=numbers)
        state = tx.init(params)
        return {k: getattr(v, "shape", None) for k, v in state.projector.items()}

    both = {"a": (10, 6, 2), "b": (6, 2), "c": None}
    assert shapes(spec) == both
    assert shapes({"a": spec, "b": spec, "c": None}) == both
    assert shapes(lambda tree: {"a": None, "b": spec, "c": None}) == {**both, "a": None}
    assert shapes(go.match_paths({"a": spec})) == both  # b by the library's own rule
    assert shapes(go.match_paths({"a": spec, "b": None})) == {**both, "b": None}


def test_dimension_numbers_in_partition() -> None:
    spec = MuonDimensionNumbers(0, 1)
    numbers = {"a": spec, "b": None}
    tx = optax.partition(
        {
            "low": go.galore(optax.sgd(1.0), rank=2, weight_dimension_numbers=numbers),
            "full": optax.sgd(1.0),
        },
        {"a": "low", "b": "full"},
    )
    params = {"a": jnp.ones((6, 8)), "b": jnp.ones((6, 8))}
    updates, _ = tx.update(params, tx.init(params))
    assert jax.tree.map(jnp.shape, updates) == {"a": (6, 8), "b": (6, 8)}


def test_rank_gap_and_scale_by_leaf() -> None:
    seen = []

    def rank(leaf: go.Leaf) -> int:
        seen.append(leaf)
        return leaf.cols // 4

    tx = go.galore(
        optax.sgd(1.0),
        rank=rank,
        scale=lambda leaf: 0.5 if leaf.batch else 1.0,
        update_proj_gap=lambda leaf: 10,
    )
    report = {leaf.path: leaf for leaf in go.describe(tx, PARAMS)}
    assert seen[0] == go.Leaf("layers/up/kernel", (3, 16, 48), 48, 16, (3,))
    assert report["layers/up/kernel"].rank == 4
    assert report["layers/up/kernel"].scale == 0.5
    assert report["w"].scale == 1.0
    assert report["w"].gap == 10


def test_dtypes() -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    tx = go.galore(optax.adam(LR), rank=4)
    state = tx.init(params)
    assert state.projector["w"].dtype == jnp.bfloat16
    dtypes = jax.tree.map(lambda x: x.dtype, state.inner_state[0].nu)
    assert dtypes["w"] == dtypes["layers"]["up"]["kernel"] == jnp.float32
    assert dtypes["embedding"] == jnp.bfloat16  # as optax.adam alone would have it
    tx = go.galore(
        optax.adam(LR), rank=4, projector_dtype=jnp.float32, moment_dtype=jnp.bfloat16
    )
    state = tx.init(PARAMS)
    assert state.projector["w"].dtype == jnp.float32
    assert state.inner_state[0].nu["embedding"].dtype == jnp.bfloat16


def test_a_leaf_that_is_not_projected_is_what_the_inner_makes_of_it() -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    inner = optax.adamw(LR)
    tx = go.galore(inner, rank=4)
    alone, whole = inner.init(params), tx.init(params)
    for step in range(3):
        gradients = normal_like(params, step)
        expected, alone = inner.update(gradients, alone, params)
        found, whole = tx.update(gradients, whole, params)
        np.testing.assert_array_equal(found["embedding"], expected["embedding"])
    nu = whole.inner_state[0].nu["embedding"]
    np.testing.assert_array_equal(nu, alone[0].nu["embedding"])


def test_f32_moments_keep_what_bf16_would_lose() -> None:
    # b2=0.999 adds a thousandth of g² a step, below half an ulp of bf16.
    params = {"w": jnp.ones((16, 16), jnp.bfloat16)}
    tx = go.galore(optax.adam(0.0), rank=4, subspace=Tilted(), update_proj_gap=1000)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(600):
        _, state = update(params, state, params)
    r = state.projector["w"].T.astype(jnp.float32) @ params["w"].astype(jnp.float32).T
    expected = (1 - 0.999**600) * np.asarray(r.T) ** 2
    np.testing.assert_allclose(state.inner_state[0].nu["w"], expected, rtol=0.02)


def test_schedule_free_around_galore() -> None:
    inner = go.galore(optax.adamw(LR, b1=0.0), rank=4)
    tx = optax.contrib.schedule_free(inner, LR)
    params, state = run(tx, PARAMS, 6)
    ready = optax.contrib.schedule_free_eval_params(state, params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(ready))


def test_extra_arguments_reach_the_inner() -> None:
    tx = go.galore(
        optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau(patience=0)), rank=4
    )
    state = tx.init(PARAMS)
    for value in (1.0, 1.0, 1.0):
        _, state = tx.update(PARAMS, state, PARAMS, value=jnp.float32(value))
    assert float(state.inner_state[1].scale) < 1.0


def test_nnx() -> None:
    nnx = pytest.importorskip("flax.nnx")

    class Block(nnx.Module):
        def __init__(self, rngs: Any):
            init = nnx.with_metadata(nnx.initializers.normal(), axes=("in", "out"))
            self.norm = nnx.RMSNorm(16, rngs=rngs)
            self.up = nnx.Linear(16, 32, kernel_init=init, rngs=rngs)
            self.down = nnx.Linear(32, 16, rngs=rngs)

    model = Block(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, go.galore_adamw(LR, rank=4), wrt=nnx.Param)
    state = nnx.as_pure(optimizer.opt_state)
    assert state.inner_state[0].mu["up"]["kernel"].shape == (4, 32)
    projected = optimizer.opt_state.inner_state[0].mu["up"]["kernel"]
    assert "axes" in model.up.kernel.get_metadata()
    assert "axes" not in projected.get_metadata()

    @nnx.jit
    def step(model: Any, optimizer: Any, x: Any) -> Any:
        def loss_fn(m: Any) -> Any:
            return jnp.mean((m.down(m.up(m.norm(x))) - 1) ** 2)

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, normal(0, (8, 16)))) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_linen_train_state_with_boxed_parameters() -> None:
    nn = pytest.importorskip("flax.linen")
    from flax.training.train_state import TrainState

    init = nn.with_partitioning(nn.initializers.normal(), ("embed", "mlp"))
    model = nn.Dense(32, kernel_init=init)
    params = model.init(jax.random.key(0), jnp.ones((1, 16)))["params"]
    tx = go.galore_adamw(LR, rank=4, weight_decay=0.1)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    mu = state.opt_state.inner_state[0].mu["kernel"]
    assert not isinstance(mu, nn.Partitioned)
    assert not isinstance(state.opt_state.projector["kernel"], nn.Partitioned)
    state = jax.jit(lambda s: s.apply_gradients(grads=s.params))(state)
    assert isinstance(state.params["kernel"], nn.Partitioned)
    assert state.params["kernel"].names == ("embed", "mlp")


def test_equinox() -> None:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 8, 32, 2, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = go.galore_adamw(LR, rank=4)
    state, update = tx.init(params), jax.jit(tx.update)
    x = normal(0, (16, 8))

    def loss(params: Any) -> Any:
        return jnp.mean((jax.vmap(eqx.combine(params, static))(x) - 1) ** 2)

    first = loss(params)
    for _ in range(20):
        updates, state = update(jax.grad(loss)(params), state, params)
        params = eqx.apply_updates(params, updates)
    assert loss(params) < 0.5 * first


def test_a_single_array_is_a_tree() -> None:
    tx = go.galore_adamw(LR, rank=4)
    updates, _ = tx.update(PARAMS["w"], tx.init(PARAMS["w"]), PARAMS["w"])
    assert updates.shape == PARAMS["w"].shape


def test_params_may_be_an_unfiltered_equinox_model() -> None:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 8, 32, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_array)  # None where the model holds functions
    tx = go.galore(optax.adamw(LR), rank=4, subspace=Tilted())
    state = tx.init(params)
    found, _ = tx.update(params, state, model)
    expected, _ = tx.update(params, state, params)
    # Of two programs; a step of Adam is at most LR.
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5 * LR)
    jax.tree.map(close, found, expected)


def test_params_in_64_bits_of_numpy_are_taken_as_jax_takes_them() -> None:
    tx = go.galore(optax.adamw(LR), rank=4)
    params = {"w": np.ones((16, 24))}
    updates, _ = tx.update(params, tx.init(params), params)  # and warns of nothing
    assert updates["w"].dtype == jnp.float32
