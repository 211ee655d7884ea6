# SPDX-License-Identifier: Apache-2.0
"""Trajectories equal those of the reference, for every side, shape, rank and layout."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import galore_optax
from tests.helpers import Tilted, tilted, with_spectrum
from tests.parity.reference import Adafactor, AdamW, Projector, svd_basis

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
SHAPES = {"tall": (40, 16), "wide": (16, 40), "square": (24, 24)}  # torch: (out, in)
RANKS = {"below": 5, "equal": 16, "above": 64}
GAP = 3
STEPS = 4 * GAP
LR, DECAY, SCALE = 0.01, 0.1, 0.25
pytestmark = pytest.mark.filterwarnings("ignore:the rank reaches a dimension")
# Named, and so projected at any rank, as in the reference.
AXES = galore_optax.match_paths(
    {
        "embedding": None,
        "kernel": MuonDimensionNumbers(reduction_axis=0, output_axis=1),
        ".*": MuonDimensionNumbers(reduction_axis=1, output_axis=0),
    }
)


def to_jax(name: str, matrix: np.ndarray) -> np.ndarray:
    """Kernels are stored (in, out); bare matrices and embeddings as in torch."""
    return matrix.T if name.endswith("kernel") else matrix


def weights(dtype: Any = np.float32) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    tree = {name: 0.1 * rng.normal(size=shape) for name, shape in SHAPES.items()}
    tree |= {f"{name}/kernel": 0.1 * rng.normal(size=s) for name, s in SHAPES.items()}
    tree["embedding"] = 0.1 * rng.normal(size=(50, 8))
    return {
        name: value.astype(dtype).astype(np.float64) for name, value in tree.items()
    }


def gradient(shape: tuple[int, int], seed: int) -> np.ndarray:
    # The leading columns stay well conditioned and the singular values well separated.
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape)


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(f"{parent}_", {})
        node[last] = value
    return tree


def as_tree(flat: dict[str, np.ndarray], dtype: Any) -> Any:
    return nest({k: jnp.asarray(to_jax(k, v), dtype) for k, v in flat.items()})


def run_ours(tx: optax.GradientTransformation, grads: list[Any], dtype: Any) -> Any:
    params = as_tree(weights(dtype), dtype)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in grads:
        updates, state = update(as_tree(step, dtype), state, params)
        params = optax.apply_updates(params, updates)
    return params


def run_reference(make: Any, grads: list[Any], dtype: Any) -> dict[str, np.ndarray]:
    flat = weights(dtype)
    optimizers = {name: make(name) for name in flat}
    for step in grads:
        flat = {k: optimizers[k].update(flat[k], step[k]) for k in flat}
    return flat


def gradients(steps: int = STEPS, make: Any = gradient) -> list[dict[str, np.ndarray]]:
    shapes = {name: value.shape for name, value in weights().items()}
    return [
        {
            k: make(shape, 100 * t + i).astype(np.float32).astype(np.float64)
            for i, (k, shape) in enumerate(shapes.items())
        }
        for t in range(steps)
    ]


def projector(name: str, proj_type: str, rank: int, basis_of: Any) -> Projector | None:
    if name == "embedding":
        return None
    return Projector(rank, GAP, SCALE, proj_type, basis_of)


def assert_same(ours: Any, theirs: dict[str, np.ndarray], rtol: float) -> None:
    """Errors relative to how far a parameter moved, not to the parameter.

    Rounding a parameter once a step, half an ulp of |p|, is not an error of the update.
    """
    start = weights()
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in by_path(ours).items()}
    for name, expected in theirs.items():
        got = flat[name]
        got = got.T if name.endswith("kernel") else got
        move = np.linalg.norm(expected - start[name])
        rounding = STEPS * np.finfo(np.float32).eps / 2 * np.linalg.norm(start[name])
        error = np.linalg.norm(got - expected)
        assert error < rtol * move + rounding, f"{name}: {error / move:.2e}"


def by_path(tree: Any) -> dict[str, Any]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    names = (
        jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs
    )
    return {
        name.replace("_/", "/"): leaf
        for name, (_, leaf) in zip(names, pairs, strict=True)
    }


def reference_adam(lr: float, eps: float = 1e-6) -> optax.GradientTransformation:
    """Adam with eps on the root of the uncorrected second moment."""
    b1, b2 = 0.9, 0.999

    def init(params: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return jnp.zeros([], jnp.int32), zeros, jax.tree.map(jnp.zeros_like, params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        del params
        count, m, v = state[0] + 1, state[1], state[2]
        m = jax.tree.map(lambda a, g: b1 * a + (1 - b1) * g, m, updates)
        v = jax.tree.map(lambda a, g: b2 * a + (1 - b2) * g * g, v, updates)
        t = count.astype(jnp.float32)
        # 1 - b2^t loses half its digits in f32 when b2^t is computed first.
        step = lr * jnp.sqrt(-jnp.expm1(t * np.log(b2))) / -jnp.expm1(t * np.log(b1))
        out = jax.tree.map(lambda a, b: -step * a / (jnp.sqrt(b) + eps), m, v)
        return out, (count, m, v)

    return optax.GradientTransformation(init, update)


def decay_after(rate: float) -> optax.GradientTransformation:
    """Decay of the updated parameter, the reference's order."""
    return optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda u, p: u - rate * (p + u), updates, params
        )
    )


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS.keys())
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_adamw_with_injected_basis(proj_type: str, rank: int) -> None:
    # 12 steps of f32 against f64: well below the 1e-5 demanded.
    inner = reference_adam(LR)
    tx = optax.chain(
        galore_optax.galore(
            inner,
            rank=rank,
            weight_dimension_numbers=AXES,
            update_proj_gap=GAP,
            scale=SCALE,
            proj_type=proj_type,
            subspace=Tilted(),
        ),
        decay_after(LR * DECAY),
    )

    def make(name: str) -> AdamW:
        return AdamW(projector(name, proj_type, rank, tilted), LR, DECAY)

    grads = gradients()
    assert_same(
        run_ours(tx, grads, jnp.float32), run_reference(make, grads, np.float32), 1e-5
    )


@pytest.mark.parametrize("b1", [None, 0.9])
@pytest.mark.parametrize("lr", [None, 0.01])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_adafactor_with_injected_basis(
    proj_type: str, lr: float | None, b1: float | None
) -> None:
    rank = RANKS["below"]
    tx = galore_optax.galore_adafactor(
        lr,
        b1=b1,
        weight_decay=DECAY,
        rank=rank,
        weight_dimension_numbers=AXES,
        update_proj_gap=GAP,
        scale=SCALE,
        proj_type=proj_type,
        subspace=Tilted(),
    )

    def make(name: str) -> Adafactor:
        chosen = projector(name, proj_type, rank, tilted)
        return Adafactor(chosen, lr, b1=b1, weight_decay=DECAY)

    grads = gradients()
    assert_same(
        run_ours(tx, grads, jnp.float32), run_reference(make, grads, np.float32), 1e-5
    )


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS.keys())
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_svd_with_a_stateless_inner(proj_type: str, rank: int) -> None:
    # Davis-Kahan: an error E of the matrix turns the subspace by |E| / gap. LAPACK's
    # backward error is a small multiple of eps |G|, so the relative error of P Pᵀ G is
    # near eps sigma_1 / (sigma_r - sigma_(r+1)), at most 1.2e-7 * 1 / 0.05 here.
    def separated(shape: tuple[int, int], seed: int) -> np.ndarray:
        return with_spectrum(seed, shape, np.linspace(1.0, 0.2, min(shape)))

    separation = 0.8 / (max(min(s) for s in SHAPES.values()) - 1)
    tolerance = 20 * np.finfo(np.float32).eps / separation
    tx = galore_optax.galore(
        optax.sgd(LR),
        rank=rank,
        weight_dimension_numbers=AXES,
        update_proj_gap=GAP,
        scale=SCALE,
        proj_type=proj_type,
        subspace=galore_optax.subspace.svd(),
    )

    class SGD:
        def __init__(self, chosen: Projector | None):
            self.projector, self.step = chosen, 0

        def update(self, p: np.ndarray, g: np.ndarray) -> np.ndarray:
            if self.projector is not None:
                g = self.projector.back(self.projector.project(g, self.step))
            self.step += 1
            return p - LR * g

    def make(name: str) -> SGD:
        return SGD(projector(name, proj_type, rank, svd_basis))

    grads = gradients(make=separated)
    assert_same(
        run_ours(tx, grads, jnp.float32),
        run_reference(make, grads, np.float32),
        tolerance,
    )


def test_svd_basis_spans_what_numpy_finds() -> None:
    tx = galore_optax.galore(
        optax.sgd(LR), rank=5, subspace=galore_optax.subspace.svd(), proj_type="full"
    )
    g = with_spectrum(3, (40, 16), np.linspace(1.0, 0.2, 16)).astype(np.float32)
    _, state = tx.update({"w": jnp.asarray(g)}, tx.init({"w": jnp.asarray(g)}))
    separation = 0.8 / 15
    for ours, matrix in zip(state.projector["w"], (g, g.T), strict=True):
        expected = svd_basis(matrix.astype(np.float64), 5)
        ours = np.asarray(ours, np.float64)
        error = np.linalg.norm(ours @ ours.T - expected @ expected.T, 2)
        assert error < 20 * np.finfo(np.float32).eps / separation


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_bf16_stays_within_its_rounding(proj_type: str) -> None:
    # Per step the basis is rounded (2^-9 relative), the update is rounded (2^-9) and so
    # is the parameter (2^-9 of |p|, with |p| near 1 and a move of 12 * LR * SCALE near
    # 0.03). Roundings are independent, so they add up as the root of the steps.
    half = 2.0**-9
    rank = RANKS["below"]
    tx = galore_optax.galore(
        reference_adam(LR),
        rank=rank,
        weight_dimension_numbers=AXES,
        update_proj_gap=GAP,
        scale=SCALE,
        proj_type=proj_type,
        subspace=Tilted(),
    )

    def make(name: str) -> AdamW:
        return AdamW(projector(name, proj_type, rank, tilted), LR)

    bf16 = jnp.bfloat16
    grads = [
        {k: np.asarray(jnp.asarray(g, bf16), np.float64) for k, g in step.items()}
        for step in gradients()
    ]
    ours, theirs = run_ours(tx, grads, bf16), run_reference(make, grads, bf16)
    start = weights(bf16)
    for name in SHAPES:
        move = np.linalg.norm(theirs[name] - start[name])
        of_weights = np.sqrt(STEPS) * half * np.linalg.norm(start[name]) / move
        error = np.asarray(ours[name], np.float64) - theirs[name]
        assert np.linalg.norm(error) / move < of_weights + 8 * half


def test_refresh_at_multiples_of_the_gap_only() -> None:
    tx = galore_optax.galore(optax.sgd(LR), rank=4, update_proj_gap=GAP)
    params = {"w": jnp.ones((16, 24))}
    state = tx.init(params)
    update = jax.jit(tx.update)
    changed = []
    for step in range(3 * GAP):
        before = state.projector["w"]
        grads = {"w": jnp.asarray(gradient((16, 24), step), jnp.float32)}
        _, state = update(grads, state, params)
        if not np.array_equal(before, state.projector["w"]):
            changed.append(step)
    assert changed == [0, GAP, 2 * GAP]
