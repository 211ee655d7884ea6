# SPDX-License-Identifier: Apache-2.0
"""Projectors in eight and four bits, inside galore."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from galore_optax.codes.affine import QuantizedProjector
from tests.affine import decoded, expected_bytes, scales_of
from tests.helpers import Tilted, counters, normal, normal_like, orthonormality

BITS = {"int8": 8, "int4": 4}
each = pytest.mark.parametrize("dtype", BITS)
MODEL = {
    "layers": {
        "up": {"kernel": jnp.zeros((2, 8, 24))},
        "norm": {"scale": jnp.ones((2, 8))},
    },
    "experts": {"up": {"kernel": jnp.zeros((2, 3, 10, 14))}},
    "query": {"kernel": jnp.zeros((15, 3, 7))},
    "w": jnp.zeros((70, 9)),
}
WEIGHTS = normal_like(MODEL, 0)
FEW = {name: WEIGHTS[name] for name in ("layers", "w")}


def axes(params: Any) -> Any:
    rules = {"experts": optax.contrib.MuonDimensionNumbers(2, 3)}
    return go.match_paths(rules)(params) if "experts" in params else None


galore = functools.partial(go.galore, rank=4, weight_dimension_numbers=axes)


def projectors(state: Any) -> dict[str, Any]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(
        state.projector, is_leaf=lambda x: isinstance(x, QuantizedProjector)
    )
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in pairs}


@each
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_state_bytes_are_those_of_the_formula(dtype: str, proj_type: str) -> None:
    tx = galore(optax.sgd(0.1), projector_dtype=dtype, proj_type=proj_type)
    state, bits = tx.init(WEIGHTS), BITS[dtype]
    found = {k: sum(x.nbytes for x in v) for k, v in projectors(state).items()}
    count = functools.partial(expected_bytes, rank=4, bits=bits)
    short = {
        "experts/up/kernel": count(6, 10),
        "layers/up/kernel": count(2, 8),
        "query/kernel": count(1, 15),
        "w": count(1, 9),
    }
    long = {
        "experts/up/kernel": count(6, 14),
        "layers/up/kernel": count(2, 24),
        "query/kernel": count(1, 21),
        "w": count(1, 70),
    }
    total = sum(short.values()) + (sum(long.values()) if proj_type == "full" else 0)
    assert sum(found.values()) == total
    if proj_type == "std":
        assert found == short
    report = {leaf.path: leaf.state_bytes for leaf in go.describe(tx, WEIGHTS)}
    both = {k: short[k] + (long[k] if proj_type == "full" else 0) for k in short}
    counts = {"experts/up/kernel": 6, "layers/up/kernel": 2, "query/kernel": 1, "w": 1}
    counters = {k: 8 * count for k, count in counts.items()}  # two int32 a matrix
    assert report == {k: both[k] + counters[k] for k in both} | {"layers/norm/scale": 0}
    for node in jax.tree.leaves(state.projector["experts"]):
        assert node.shape[:2] == (2, 3)  # batch axes first


@each
def test_the_first_projector_is_the_identity_up_to_rounding(dtype: str) -> None:
    state = galore(optax.sgd(0.1), projector_dtype=dtype).init(WEIGHTS)
    shapes = {"experts/up/kernel": (2, 3, 10, 4), "w": (9, 4)}
    for path, shape in shapes.items():
        back = decoded(projectors(state)[path], shape, BITS[dtype])
        eye = np.broadcast_to(np.eye(*shape[-2:]), shape)
        np.testing.assert_array_equal(back[eye == 0], 0)
        np.testing.assert_allclose(back[eye == 1], 1, rtol=2**-7)


@pytest.mark.parametrize(
    "dtype", ["int8", pytest.param("int4", marks=pytest.mark.one_device)]
)
def test_update_lies_in_the_span_of_the_decoded_projector(dtype: str) -> None:
    """sgd without momentum: the update is -P PᵀG, with P what is stored, exactly."""
    tx = galore(optax.sgd(1.0), scale=1.0, projector_dtype=dtype)
    grads = normal_like(MODEL, 1)
    updates, state = jax.jit(tx.update)(grads, tx.init(WEIGHTS))
    found = functools.partial(decoded, bits=BITS[dtype])
    nodes = projectors(state)
    cases = [  # stored projector, its shape, einsum of P PᵀG
        ("w", (9, 4), "br,cr,ac->ab", lambda t: t["w"]),
        (
            "query/kernel",
            (15, 4),
            "ar,dr,dbc->abc",
            lambda t: t["query"]["kernel"],
        ),
        (
            "layers/up/kernel",
            (2, 8, 4),
            "lar,lcr,lcb->lab",
            lambda t: t["layers"]["up"]["kernel"],
        ),
        (
            "experts/up/kernel",
            (2, 3, 10, 4),
            "xyar,xycr,xycb->xyab",
            lambda t: t["experts"]["up"]["kernel"],
        ),
    ]
    for path, shape, equation, pick in cases:
        p = found(nodes[path], shape)
        expected = -np.einsum(equation, p, p, np.asarray(pick(grads), np.float64))
        np.testing.assert_allclose(pick(updates), expected, rtol=1e-4, atol=1e-5)
        assert orthonormality(p) < {"int8": 0.03, "int4": 0.4}[dtype]


@pytest.mark.optimized
@pytest.mark.one_device
@pytest.mark.skipif(jax.device_count() > 1, reason="needs a single device")
def test_lift_decodes_again() -> None:
    """Or every basis of the tree would be held from the first product to the last."""
    tx = go.galore(optax.sgd(1.0), rank=4, projector_dtype="int4")
    params = {"w": jnp.zeros((9, 70))}
    update = jax.jit(functools.partial(tx.update, refresh=False))
    text = update.lower(params, tx.init(params)).compile().as_text()
    assert len(re.findall(r" = u8\[\S* shift-right-logical\(", text)) == 2


def test_axes_of_a_projected_side_are_taken_as_one() -> None:
    """Attention's (heads, head_dim) side."""
    params = {"query": {"kernel": normal(0, (30, 3, 7))}}
    make = functools.partial(go.galore, optax.sgd(1.0), rank=4, scale=1.0)
    tx = make(projector_dtype="int4", proj_type="left")
    state = tx.init(params)
    assert state.projector["query"]["kernel"].scales.shape == (1, 4)
    updates, state = jax.jit(tx.update)(params, state)
    p = decoded(state.projector["query"]["kernel"], (3, 7, 4), 4)
    g = np.asarray(params["query"]["kernel"], np.float64)
    expected = -np.einsum("bcr,der,ade->abc", p, p, g)
    np.testing.assert_allclose(
        updates["query"]["kernel"], expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("dtype", "proj_type"), [("int8", "full"), ("int4", "std")])
def test_close_to_f32_over_steps(dtype: str, proj_type: str) -> None:
    """P' = P + E with |E| <= s/2 an entry, so |P'RP'.. - PRP| <= (2e + e²)|G| a side.

    s <= (max + |min|) / L * (1 + 2^-7) and entries of a basis are at most 1, so that a
    column of m entries has |E| <= s/2 sqrt(m), and e, the norm of all r columns, at
    most sqrt(r m) s/2. sgd is linear: the difference adds up over steps as that does.
    """
    rank, (m, n), bits = 3, (24, 40), BITS[dtype]
    params = {"w": jnp.zeros((n, m))}
    make = functools.partial(
        go.galore,
        optax.sgd(1.0),
        rank=rank,
        scale=1.0,
        proj_type=proj_type,
        subspace=Tilted(),
        update_proj_gap=2,
    )
    tx, exact = make(projector_dtype=dtype), make()
    state, expected_state = tx.init(params), exact.init(params)
    update, exact_update = jax.jit(tx.update), jax.jit(exact.update)
    for step in range(4):
        g = {"w": normal(step, (n, m))}
        found, state = update(g, state)
        expected, expected_state = exact_update(g, expected_state)
        bound = 0.0
        for x in jax.tree.leaves(expected_state.projector):
            e = np.linalg.norm(scales_of(np.asarray(x), bits)) / 2 * (1 + 2**-7)
            bound = bound + (1 + bound) * (2 * e + e * e)
        distance = np.linalg.norm(found["w"] - expected["w"])
        assert distance <= bound * np.linalg.norm(g["w"]) * 1.001
        # And nowhere near it: errors of rounding have random signs.
        assert distance < {8: 0.02, 4: 0.4}[bits] * np.linalg.norm(expected["w"])


@each
def test_an_unsound_basis_leaves_the_codes(dtype: str) -> None:
    tx = galore(optax.sgd(0.1), update_proj_gap=1, projector_dtype=dtype)
    update, good = jax.jit(tx.update), normal_like(FEW, 1)
    _, state = update(good, tx.init(FEW))
    before = jax.tree.map(np.asarray, state.projector)
    bad = normal_like(FEW, 2)
    kernel = bad["layers"]["up"]["kernel"].at[1].set(jnp.nan)
    bad["layers"]["up"]["kernel"] = kernel
    _, state = update(bad, state)
    old, new = (
        before["layers"]["up"]["kernel"],
        state.projector["layers"]["up"]["kernel"],
    )
    for a, b in zip(old, new, strict=True):
        np.testing.assert_array_equal(a[1], b[1])
    assert np.any(old.codes[0] != new.codes[0])
    assert np.any(before["w"].codes != state.projector["w"].codes)
    assert sum(counters(state.refresh.refused)) == 1


@each
def test_the_check_comes_before_the_storing(dtype: str) -> None:
    """Four bits are further from orthonormal than the check allows, and are taken."""
    tx = galore(optax.sgd(0.1), projector_dtype=dtype)
    _, state = jax.jit(tx.update)(normal_like(FEW, 1), tx.init(FEW))
    assert sum(counters(state.refresh.refused)) == 0
    if dtype == "int4":
        assert orthonormality(decoded(state.projector["w"], (9, 4), 4)) > 1e-3


def test_resumes_exactly(tmp_path: Any) -> None:
    ocp = pytest.importorskip("orbax.checkpoint")
    tx = galore(
        go.quantized(optax.adamw(0.1), code=go.codes.companded(min_size=64)),
        update_proj_gap=2,
        projector_dtype="int4",
        subspace=go.subspace.random(),
    )
    update = jax.jit(tx.update)
    _, state = update(normal_like(FEW, 1), tx.init(FEW), FEW)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        found = saver.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for step in range(2, 4):
        grads = normal_like(FEW, step)
        one, state = update(grads, state, FEW)
        two, found = update(grads, found, FEW)
        jax.tree.map(np.testing.assert_array_equal, (one, state), (two, found))


def types(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(lambda: tree)
    )


@pytest.mark.parametrize(
    ("dtype", "of_params"), [("int8", jnp.bfloat16), ("int4", jnp.float32)]
)
def test_types_buffers_and_donation(dtype: str, of_params: Any) -> None:
    weights = jax.tree.map(lambda x: x.astype(of_params), {"w": WEIGHTS["w"]})
    tx = galore(optax.lamb(0.1), projector_dtype=dtype, proj_type="full")
    state = tx.init(weights)
    assert types(jax.eval_shape(tx.init, weights)) == types(state)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
    before = types(state)

    def maybe(flag: Any, state: Any) -> Any:
        skip = lambda: (weights, state)  # noqa: E731
        return jax.lax.cond(flag, lambda: tx.update(weights, state, weights), skip)

    step = jax.jit(maybe, donate_argnums=1)
    for flag in (True, False):
        updates, state = step(flag, state)
        assert types(state) == before
        assert types(updates) == types(weights)


def test_float64() -> None:
    with jax.enable_x64(True):
        weights = {"w": normal(0, (9, 70), jnp.float64)}
        tx = galore(optax.sgd(1.0), scale=1.0, projector_dtype="int8")
        updates, state = jax.jit(tx.update)(weights, tx.init(weights))
        p = decoded(state.projector["w"], (9, 4), 8)
        # Computed in f64 from the codes, which a scale in f32 would not change.
        np.testing.assert_allclose(updates["w"], -p @ (p.T @ weights["w"]), rtol=1e-12)


def test_seeds_by_vmap() -> None:
    tx = go.galore(optax.adam(0.1), rank=2, projector_dtype="int4")
    weights = {"w": normal(0, (2, 8, 12))}
    grads = {"w": normal(1, (2, 8, 12))}
    states = jax.jit(jax.vmap(tx.init))(weights)
    _, states = jax.jit(jax.vmap(tx.update))(grads, states)
    update = jax.jit(tx.update)
    for lane in range(2):
        mine, theirs = (jax.tree.map(lambda x: x[lane], y) for y in (states, grads))  # noqa: B023
        _, single = update(theirs, tx.init(theirs))
        assert types(mine) == types(single)
        p, q = (decoded(x.projector["w"], (8, 2), 4) for x in (mine, single))
        # A basis that differs in its last bits may round to the next code.
        assert np.abs(p - q).max() <= float(single.projector["w"].scales.max()) * 1.01
        assert (np.abs(p - q) > 1e-6).mean() <= 0.1


METHODS = {
    "power": go.subspace.power(),
    "random": go.subspace.random(),
    "gaussian": go.subspace.random(orthonormal=False),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str) -> None:
    grads = {"w": normal(1, (12, 30))}
    make = functools.partial(
        go.galore, optax.sgd(1.0), rank=4, subspace=METHODS[method]
    )
    stored, exact = make(projector_dtype=jnp.int8), make()
    _, state = jax.jit(stored.update)(grads, stored.init(grads))
    _, expected = jax.jit(exact.update)(grads, exact.init(grads))
    p = np.asarray(expected.projector["w"])
    # One step more than half: bases of two compilations may round apart.
    error = np.abs(decoded(state.projector["w"], (12, 4), 8) - p)
    assert np.all(error <= scales_of(p, 8) * (0.5 + 2**-7) + 1e-5)
    ours, theirs = (
        float(go.captured_energy(tx, s, grads)["w"])
        for tx, s in ((stored, state), (exact, expected))
    )
    assert ours == pytest.approx(theirs, rel=0.02)


# Refusals.


@pytest.mark.filterwarnings("ignore:the rank reaches a dimension")
def test_a_state_of_another_storage_is_refused() -> None:
    params = {"a": {"kernel": jnp.ones((8, 12))}, "row": jnp.ones((1, 6))}
    one = go.match_paths({"row": optax.contrib.MuonDimensionNumbers(1, 0)})
    makers = {
        name: go.galore(
            optax.sgd(0.1),
            rank=4,
            projector_dtype=name,
            weight_dimension_numbers=one,
        )
        for name in (None, "int8", "int4")
    }
    words = {
        None: r"rank 4 and shape \(8, 4\)",
        "int8": r"rank 4 in eight bits, codes \(8, 4\) and scales \(1, 4\)",
        "int4": r"rank 4 in four bits, codes \(4, 4\) and scales \(1, 4\)",
    }
    for found, maker in makers.items():
        state = jax.eval_shape(maker.init, params)
        for needed, tx in makers.items():
            if needed == found:
                jax.eval_shape(tx.update, params, state)
                continue
            what = f"holds a projector of {words[found]} for 'a/kernel', but this"
            wanted = f"needs a projector of {words[needed]}. Restore .*projector_dtype"
            with pytest.raises(ValueError, match=f"{what} configuration {wanted}"):
                tx.update(params, state)
            row = {"row": params["row"]}
            with pytest.raises(ValueError, match="for 'row', but"):
                tx.update(row, jax.eval_shape(maker.init, row))


def test_other_states_are_refused() -> None:
    params = {"w": jnp.ones((8, 12))}
    tx = go.galore(optax.sgd(0.1), rank=4, projector_dtype="int8")
    state = tx.init(params)
    as_dict = state._replace(projector={"w": state.projector["w"]._asdict()})
    with pytest.raises(ValueError, match="projector of type dict for 'w'"):
        tx.update(params, as_dict)
    pair = state._replace(projector={"w": (state.projector["w"],) * 2})
    with pytest.raises(ValueError, match=r"and of rank 4 in eight bits.* for 'w'"):
        tx.update(params, pair)


@pytest.mark.parametrize(
    "dtype", [jnp.int16, jnp.uint8, jnp.complex64, "bogus", "int3", 8]
)
def test_other_dtypes_are_refused(dtype: Any) -> None:
    with pytest.raises(TypeError, match=r"projector_dtype=.*jnp.int8 or jnp.int4"):
        go.galore(optax.sgd(0.1), projector_dtype=dtype)


@pytest.mark.parametrize(
    "name", ["int8", jnp.int8, np.int8, jnp.dtype("int8"), np.dtype(np.int8)]
)
def test_spellings(name: Any) -> None:
    for make in (go.galore_adamw, go.galore_adafactor, go.galore_adamw8bit):
        state = make(0.1, rank=4, projector_dtype=name).init({"w": jnp.ones((8, 12))})
        codes = [x for x in jax.tree.leaves(state) if x.shape == (8, 4)]
        assert [x.dtype for x in codes] == [jnp.int8]
