# SPDX-License-Identifier: Apache-2.0
"""Gradients projected ahead of the update."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from tests.helpers import counters, normal_like

PARAMS = {"up": jnp.ones((16, 24)), "down": jnp.ones((24, 16)), "bias": jnp.ones(24)}


def step(tx: Any, state: Any, micro_batches: list[Any]) -> tuple[Any, Any]:
    total: Any = None
    for number, gradients in enumerate(micro_batches):
        low, state = galore_optax.project_gradients(
            tx, gradients, state, PARAMS, refresh=None if number == 0 else False
        )
        total = low if total is None else jax.tree.map(jnp.add, total, low)
    mean = jax.tree.map(lambda x: x / len(micro_batches), total)
    return galore_optax.update_projected(tx, mean, state, PARAMS)


def adamw(**options: Any) -> Any:
    return galore_optax.galore_adamw(1e-2, rank=4, weight_decay=0.1, **options)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance),
        found,
        expected,
    )


@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_one_micro_batch_is_the_plain_update(proj_type: str) -> None:
    tx = adamw(proj_type=proj_type)
    gradients = normal_like(PARAMS, 0)
    state = tx.init(PARAMS)
    updates, found = step(tx, state, [gradients])
    expected, plain = tx.update(gradients, state, PARAMS)
    assert_close(updates, expected, 0)
    assert_close(found, plain, 0)


def test_between_refreshes_the_mean_may_be_taken_before_or_after() -> None:
    tx = adamw(update_proj_gap=10)
    parts = [normal_like(PARAMS, seed) for seed in range(4)]
    _, state = tx.update(parts[0], tx.init(PARAMS), PARAMS)
    updates, found = step(tx, state, parts)
    mean = jax.tree.map(lambda *x: sum(x) / 4, *parts)
    expected, plain = tx.update(mean, state, PARAMS)
    # Sums of 24 products in f32, in another order; Adam's update is at most 1e-2 * 4.
    assert_close(updates, expected, 24 * 1.2e-7 * 4e-2 * 10)
    assert_close(found.inner_state[0].mu, plain.inner_state[0].mu, 24 * 1.2e-7)


def test_the_first_micro_batch_decides_the_bases() -> None:
    tx = adamw()
    parts = [normal_like(PARAMS, seed) for seed in range(2)]
    state = tx.init(PARAMS)
    _, found = step(tx, state, parts)
    _, first = tx.update(parts[0], state, PARAMS)
    assert_close(found.projector, first.projector, 0)
    assert int(found.count) == 1
    assert set(counters(found.refresh.last)) == {0}


@pytest.mark.parametrize("given", ["gradients", "coordinates"])
def test_micro_steps_add_up_coordinates(given: str) -> None:
    tx = adamw(update_proj_gap=1)
    parts = [normal_like(PARAMS, seed) for seed in range(3)]
    _, old = tx.update(parts[0], tx.init(PARAMS), PARAMS)  # bases of another gradient
    multi = galore_optax.ProjectedMultiSteps(tx, 3)
    state = multi.init(PARAMS)._replace(inner_opt_state=old)
    shapes = jax.tree.map(jnp.shape, state.acc_grads)
    assert shapes == {"up": (4, 24), "down": (24, 4), "bias": (24,)}

    @jax.jit
    def micro_step(gradients: Any, state: Any) -> tuple[Any, Any]:
        if given == "gradients":
            return multi.update(gradients, state, PARAMS)
        low, state = galore_optax.project_gradients(multi, gradients, state, PARAMS)
        return galore_optax.update_projected(multi, low, state, PARAMS)

    for part in parts:
        updates, state = micro_step(part, state)
        last = part is parts[-1]
        assert all(bool(x.any()) == last for x in jax.tree.leaves(updates))
    expected, plain = step(tx, old, parts)
    # Sums in another order, as above, of bases that were found in another program:
    # products with a gradient are rounded to bf16 there, and show it.
    assert_close(updates, expected, 1e-3)
    assert counters(state.inner_opt_state.refresh) == counters(plain.refresh)


def test_micro_steps_of_gradients_do_not_take_coordinates() -> None:
    for multi in (galore_optax.MultiSteps(adamw(), 2), optax.MultiSteps(adamw(), 2)):
        state = multi.init(PARAMS)
        low, state = galore_optax.project_gradients(multi, PARAMS, state, PARAMS)
        with pytest.raises(ValueError, match=r"down: .*\(24, 4\).*ProjectedMultiSteps"):
            galore_optax.update_projected(multi, low, state, PARAMS)


def test_several_galores_and_none() -> None:
    labels = {"up": "high", "down": "low", "bias": "plain"}
    parts = {"high": adamw(), "low": adamw(), "plain": optax.adam(1e-2)}
    tx = optax.partition(parts, labels)
    gradients = normal_like(PARAMS, 0)
    updates, _ = step(tx, tx.init(PARAMS), [gradients])
    expected, _ = tx.update(gradients, tx.init(PARAMS), PARAMS)
    assert_close(updates, expected, 0)
    adam = optax.adam(1e-2)
    same, state = galore_optax.project_gradients(
        adam, gradients, adam.init(PARAMS), PARAMS
    )
    assert_close(same, gradients, 0)
    assert jax.tree.structure(state) == jax.tree.structure(adam.init(PARAMS))


def test_wrong_coordinates_are_named() -> None:
    tx = adamw()
    state, gradients = tx.init(PARAMS), normal_like(PARAMS, 0)
    with pytest.raises(ValueError, match=r"update_projected needs params"):
        galore_optax.update_projected(tx, gradients, state, None)
    with pytest.raises(ValueError, match=r"\(24, 16\) for 'down'.*are \(24, 4\)"):
        galore_optax.update_projected(tx, gradients, state, PARAMS)


def test_what_precedes_galore_and_is_not_linear_is_refused() -> None:
    """A norm of coordinates is another one; a constant factor is the same."""
    gradients = normal_like(PARAMS, 0)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw())
    with pytest.raises(ValueError, match=r"precedes galore .*before project_gradients"):
        step(clipped, clipped.init(PARAMS), [gradients])
    scaled = optax.chain(optax.scale(0.5), adamw())
    updates, _ = step(scaled, scaled.init(PARAMS), [gradients])
    expected, _ = scaled.update(gradients, scaled.init(PARAMS), PARAMS)
    # Coordinates are halved in place of gradients, which is exact.
    assert_close(updates, expected, 0)
