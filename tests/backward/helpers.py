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

RANK = 2

# Both ways add up the same products in another order. In f64 no order of the few
# thousand terms in these tests moves a sum by more than 1e-12 of the largest term, and
# a term that is wrong or missing moves it by more than 1e-6.
F64 = 1e-10


@contextlib.contextmanager
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def normals(seed: int, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape) / shape[-1] ** 0.5)
        for name, shape in shapes.items()
    }


def galore(**chosen: Any) -> optax.GradientTransformation:
    return galore_optax.galore(optax.sgd(1.0), rank=RANK, **chosen)


def formed(
    loss: Callable[..., Any], tx: optax.GradientTransformation, **chosen: Any
) -> Callable[..., Any]:
    """What `value_and_projected_grad` is to equal."""

    def run(params: Any, state: Any, *args: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(params, *args)
        low, state = galore_optax.project_gradients(
            tx, gradients, state, params, **chosen
        )
        return value, low, state

    return run


def compare(
    loss: Callable[..., Any],
    params: Any,
    *args: Any,
    tx: optax.GradientTransformation | None = None,
    tolerance: float = F64,
) -> Any:
    """Asserts that both ways agree, after a refresh; the coordinates."""
    tx = tx or galore()
    never = galore_optax.value_and_projected_grad(loss, tx)
    state = tx.init(params)
    expected = jax.jit(formed(loss, tx))(params, state, *args)
    found = jax.jit(never)(params, state, *args)
    assert_close(found, expected, tolerance)
    return found[1]


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Alike in structure and dtypes, and off by `tolerance` of the largest entry."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert one.dtype == other.dtype
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        scale = max(float(np.max(np.abs(other), initial=0)), 1e-30)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


def is_formed(
    loss: Callable[..., Any], params: Any, *args: Any, **chosen: Any
) -> dict[str, list[str]]:
    """By leaf, the operations for which its gradient is formed."""
    tx = chosen.pop("tx", None) or galore(**chosen)
    found = galore_optax.explain(loss, tx, params, *args)
    return {leaf.path: [use.primitive for use in leaf.formed] for leaf in found}
