# SPDX-License-Identifier: Apache-2.0
"""Gradients that are formed and projected, beside those that never are."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax
from tests.helpers import normal_like

RANK = 2
TYPES = ("std", "reverse_std", "full")

# Both ways add up the same products in another order. In f64 no order of the few
# thousand terms in these tests moves a sum by more than 1e-12 of the largest term, and
# a term that is wrong or missing moves it by more than 1e-6.
F64 = 1e-10

Loss = Callable[..., Any]


@contextlib.contextmanager
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def normals(seed: int, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Arrays of about unit norm by their last axis."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape) / max(shape, default=1) ** 0.5)
        for name, shape in shapes.items()
    }


def galore(**chosen: Any) -> optax.GradientTransformation:
    return galore_optax.galore(optax.sgd(1.0), rank=RANK, **chosen)


def state_of(tx: optax.GradientTransformation, params: Any) -> Any:
    """A state whose bases are any matrices, not slices of the identity."""
    state = tx.init(params)
    return state._replace(projector=normal_like(state.projector, 7))


def formed(
    loss: Loss, tx: optax.GradientTransformation, refresh: Any = None
) -> Callable[..., Any]:
    """What `value_and_projected_grad` is to equal."""

    def run(params: Any, state: Any, *args: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, *args)
        low, state = galore_optax.project_gradients(
            tx, gradients, state, params, refresh=refresh
        )
        return value, low, state

    return run


def both(
    loss: Loss, tx: optax.GradientTransformation, refresh: Any = None
) -> Callable[..., Any]:
    """(never formed, formed), as one function."""
    never = galore_optax.value_and_projected_grad(loss, tx, refresh=refresh)
    always = formed(loss, tx, refresh)
    return lambda *args: (never(*args), always(*args))


def assert_equal_ways(
    loss: Loss, params: Any, *args: Any, tolerance: float = F64, **chosen: Any
) -> None:
    """For every `proj_type`, in one program."""
    txs = [galore(proj_type=proj_type, **chosen) for proj_type in TYPES]

    def run(params: Any, states: list[Any], *args: Any) -> list[Any]:
        pairs = zip(txs, states, strict=True)
        return [both(loss, tx, False)(params, state, *args) for tx, state in pairs]

    states = [state_of(tx, params) for tx in txs]
    for found, expected in jax.jit(run)(params, states, *args):
        assert_close(found, expected, tolerance)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Alike in structure and dtypes, and off by `tolerance` of the largest entry."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for one, other in pairs:
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        scale = max(float(np.max(np.abs(other), initial=0)), 1e-30)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


def uses(loss: Loss, params: Any, *args: Any, **chosen: Any) -> dict[str, list[str]]:
    """By leaf, the operations for which its gradient is formed."""
    found = galore_optax.explain(loss, galore(**chosen), params, *args)
    return {leaf.path: [use.primitive for use in leaf.formed] for leaf in found}
