# SPDX-License-Identifier: Apache-2.0
"""What `metrics` tells, beside NumPy's norms."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from galore_optax import layerwise
from tests.helpers import normal_like

PARAMS = normal_like(
    {
        "embedding": jnp.ones((20, 8)),
        "layers": {"up": {"kernel": jnp.ones((3, 8, 24))}},
        "w": jnp.ones((16, 8)),
    },
    seed=0,
)
GRADIENTS = normal_like(PARAMS, seed=1)
UP = "layers/up/kernel"
NAMES = "energy", "projected_norm", "gradient_norm", "effective_rank", "age", "refused"
# Sums of at most 600 squares in f32.
CLOSE = {"rtol": 600 * 2.0**-24}


def stepped(tx: Any, steps: int = 1, gradients: Any = GRADIENTS) -> Any:
    state = tx.init(PARAMS)
    for _ in range(steps):
        _, state = tx.update(gradients, state, PARAMS)
    return state


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    tx = go.galore(optax.adam(1e-3), rank=4)
    return go.metrics(tx, stepped(tx), GRADIENTS)


def norm(*arrays: Any) -> Any:
    return np.sqrt(sum(np.sum(np.square(np.asarray(x, np.float64))) for x in arrays))


def test_names(found: dict[str, Any]) -> None:
    of_projected = {f"{name}/{path}" for name in NAMES for path in (UP, "w")}
    whole = set(NAMES)
    assert set(found) == of_projected | whole | {"gradient_norm/embedding"}
    assert {x.shape for x in found.values()} == {()}


def test_norms_are_those_of_the_gradients(found: dict[str, Any]) -> None:
    leaves = {"embedding": GRADIENTS["embedding"], "w": GRADIENTS["w"]}
    leaves[UP] = GRADIENTS["layers"]["up"]["kernel"]
    for path, gradient in leaves.items():
        np.testing.assert_allclose(
            found[f"gradient_norm/{path}"], norm(gradient), **CLOSE
        )
    np.testing.assert_allclose(found["gradient_norm"], norm(*leaves.values()), **CLOSE)


def test_coordinates_are_those_of_the_state() -> None:
    tx = go.galore(optax.adam(1e-3), rank=4)
    state = stepped(tx)
    found = go.metrics(tx, state, GRADIENTS)
    p, g = state.projector["w"], GRADIENTS["w"]  # 16 outputs by 8 inputs
    assert p.shape == (8, 4)
    low = np.asarray(g, np.float64) @ np.asarray(p, np.float64)
    np.testing.assert_allclose(found["projected_norm/w"], norm(low), **CLOSE)
    np.testing.assert_allclose(
        found["energy/w"], (norm(low) / norm(g)) ** 2, rtol=2 * CLOSE["rtol"]
    )
    each = go.captured_energy(tx, state, GRADIENTS)[UP]  # of three matrices
    squares = np.sum(np.square(GRADIENTS["layers"]["up"]["kernel"]), (1, 2))
    np.testing.assert_allclose(
        found[f"energy/{UP}"], np.sum(each * squares) / np.sum(squares), rtol=1e-4
    )
    parts = found[f"projected_norm/{UP}"], found["projected_norm/w"]
    np.testing.assert_allclose(found["projected_norm"], norm(*parts), **CLOSE)
    whole = found[f"gradient_norm/{UP}"], found["gradient_norm/w"]
    np.testing.assert_allclose(
        found["energy"], (norm(*parts) / norm(*whole)) ** 2, rtol=2 * CLOSE["rtol"]
    )


def each_matrix(tree: Any) -> list[tuple[str, Any]]:
    """Of gradients, or of projectors in pairs: path and value of each matrix."""
    stack = tree["layers"]["up"]["kernel"]
    stacked = zip(*stack, strict=True) if isinstance(stack, tuple) else stack
    return [("w", tree["w"]), *((UP, one) for one in stacked)]


def low(gradient: Any, bases: Any) -> np.ndarray:
    """Coordinates: each basis along the axis that has its length."""
    found = np.float64(gradient)
    for basis in bases if isinstance(bases, tuple) else (bases,):
        axis = found.shape.index(len(basis))
        found = np.moveaxis(np.tensordot(found, basis, ((axis,), (0,))), -1, axis)
    return found


@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_effective_rank_is_that_of_the_singular_values(proj_type: str) -> None:
    tx = go.galore(optax.adam(1e-3), rank=4, proj_type=proj_type)
    state = stepped(tx)
    found = go.metrics(tx, state, GRADIENTS)
    least: dict[str, float] = {}
    pairs = zip(each_matrix(GRADIENTS), each_matrix(state.projector), strict=True)
    for (path, gradient), (_, bases) in pairs:
        values = np.linalg.svd(low(gradient, bases), compute_uv=False) ** 2
        rank = np.sum(values) ** 2 / np.sum(values**2)
        assert 1 < rank < 4
        least[path] = min(rank, least.get(path, np.inf))
    least[""] = min(least.values())
    for path, rank in least.items():
        name = f"effective_rank/{path}".removesuffix("/")
        np.testing.assert_allclose(found[name], rank, rtol=4 * CLOSE["rtol"])


@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_overlap_is_the_trace_of_two_orthogonal_projections(proj_type: str) -> None:
    tx = go.galore(optax.adam(1e-3), rank=4, update_proj_gap=1, proj_type=proj_type)
    first = stepped(tx)
    _, second = tx.update(normal_like(PARAMS, seed=2), first, PARAMS)
    shapes = jax.eval_shape(lambda: PARAMS)
    found = jax.jit(lambda *x: go.basis_overlap(tx, *x, shapes))(second, first)
    same = go.basis_overlap(tx, first, first, PARAMS)
    expected: dict[str, list[float]] = {"w": [], UP: []}
    states = map(each_matrix, (first.projector, second.projector))
    for (path, old), (_, new) in zip(*states, strict=True):
        expected[path].append(trace(old, new))
    for path, traces in expected.items():
        np.testing.assert_allclose(np.ravel(found[path]), traces, atol=1e-5)
        np.testing.assert_allclose(same[path], 1, atol=1e-5)
        assert np.all(found[path] < 0.95)


def trace(old: Any, new: Any) -> float:
    """Of `P Pᵀ Q Qᵀ / r`; of two sides the smaller one."""
    if isinstance(old, tuple):
        return min(map(trace, old, new))
    p, q = np.float64(old), np.float64(new)
    return float(np.trace(p @ p.T @ q @ q.T)) / p.shape[1]


def test_age_counts_from_the_update_that_renewed() -> None:
    tx = go.galore(optax.sgd(1.0), rank=4, update_proj_gap={UP: 2, "w": 3})
    state, ages = tx.init(PARAMS), []
    for _ in range(5):
        _, state = tx.update(GRADIENTS, state, PARAMS)
        found = go.metrics(tx, state, GRADIENTS)
        ages.append((int(found[f"age/{UP}"]), int(found["age/w"]), int(found["age"])))
    assert ages == [(0, 0, 0), (1, 1, 1), (0, 2, 2), (1, 0, 1), (0, 1, 1)]


def test_refusals_and_gradients_of_zero() -> None:
    tx = go.galore(optax.sgd(1.0), rank=4)
    zero = GRADIENTS | {"w": jnp.zeros((16, 8))}
    state = stepped(tx, 2, zero)
    found = go.metrics(tx, state, zero)
    assert int(found["refused/w"]) == int(found["refused"]) == 2
    assert int(found[f"refused/{UP}"]) == 0
    assert np.isnan(found["energy/w"])
    assert np.isnan(found["effective_rank/w"])
    assert found["effective_rank"] == found[f"effective_rank/{UP}"]
    assert found["gradient_norm/w"] == found["projected_norm/w"] == 0
    assert 0 < found["energy"] < 1


def test_sizes_whose_squares_are_out_of_range() -> None:
    tx = go.galore(optax.sgd(1.0), rank=4)
    state = stepped(tx)
    usual = go.metrics(tx, state, GRADIENTS)
    for size in (2.0**80, 2.0**-100):
        found = go.metrics(tx, state, jax.tree.map(lambda g, s=size: g * s, GRADIENTS))
        for name in ("gradient_norm", "projected_norm/w", f"gradient_norm/{UP}"):
            np.testing.assert_allclose(found[name], size * usual[name], **CLOSE)
        np.testing.assert_allclose(found["energy"], usual["energy"], **CLOSE)


def test_inside_a_compiled_step_and_whatever_is_around() -> None:
    tx = optax.chain(optax.clip_by_global_norm(1.0), go.galore_adamw(1e-2, rank=4))

    @jax.jit
    def step(state: Any) -> Any:
        _, state = tx.update(GRADIENTS, state, PARAMS)
        return state, go.metrics(tx, state, GRADIENTS)

    state, found = step(tx.init(PARAMS))
    outside = go.metrics(tx, state, GRADIENTS)
    for name, value in found.items():
        np.testing.assert_allclose(value, outside[name], **CLOSE)


def test_what_has_no_projection_is_named() -> None:
    with pytest.raises(ValueError, match="contains no galore"):
        go.metrics(optax.adam(1e-3), optax.adam(1e-3).init(PARAMS), GRADIENTS)
    tx = go.galore(optax.sgd(1.0), rank=4)
    params = layerwise.Params({}, PARAMS["layers"], {"w": PARAMS["w"]})
    model = layerwise.Model(lambda *_: None, lambda *_: None, lambda *_: None)
    state = layerwise.make_step(model, tx).init(params)
    with pytest.raises(ValueError, match="holds no GaLoreState for the leaves"):
        go.metrics(tx, state, params)
