# SPDX-License-Identifier: Apache-2.0
"""Layer by layer: the same numbers as the whole tree, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax
from galore_optax import layerwise
from tests.layered import (
    EPS,
    EXACT,
    HIDDEN,
    MODEL,
    RATE,
    STEPS,
    TIED,
    WIDTH,
    assert_close,
    batches,
    block,
    embed,
    field,
    galore,
    head,
    loss_of,
    parameters,
    plain_step,
    stacked,
)

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("count", "remat", "stagger"),
    [
        (1, True, False),
        (4, False, True),
        pytest.param(1, False, True, marks=slow),
        pytest.param(4, True, False, marks=slow),
    ],
)
def test_equals_the_whole_tree(count: int, remat: bool, stagger: bool) -> None:
    """Over 20 steps, a schedule and two refreshes after the first."""
    tx = galore(stagger=stagger)
    step = layerwise.make_step(TIED, tx, remat=remat)
    update, plain = jax.jit(step.update), plain_step(TIED, tx)
    params = whole = parameters()
    nudged = jax.tree.map(lambda x: x * (1 + EPS), whole)
    state, whole_state, nudged_state = step.init(params), tx.init(whole), tx.init(whole)
    for number in range(STEPS):
        data = batches(number, count)
        params, state, _ = update(params, state, data)
        whole, whole_state, _ = plain(whole, whole_state, data)
        nudged, nudged_state, _ = plain(nudged, nudged_state, data)

    def trees(params: Any, state: Any, find: Any) -> list[Any]:
        return [params, *(find(state, name) for name in ("projector", "mu", "nu"))]

    for found, expected, other in zip(
        trees(params, state, stacked),
        trees(whole, whole_state, field),
        trees(nudged, nudged_state, field),
        strict=True,
    ):
        # As close as the whole tree comes to itself when it starts one rounding away.
        differences = jax.tree.map(lambda a, b: jnp.max(abs(a - b)), expected, other)
        assert_close(found, expected, 4 * float(max(jax.tree.leaves(differences))))
    # Counts and schedules advance once a step, whatever the micro-batches.
    assert np.all(state.blocks.count == STEPS)
    for name in ("last", "refused"):
        expected = getattr(whole_state.refresh, name)
        parts = zip(layerwise.Params._fields, state, strict=True)
        found = {part: getattr(getattr(x.refresh, name), part) for part, x in parts}
        assert_close(layerwise.Params(**found), expected, 0)


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tree)


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_of_layers_need_not_be_formed(count: int) -> None:
    """The same steps, two refreshes among them; sums in f64 differ by 1e-15."""
    tx = galore_optax.galore(
        optax.sgd(0.1),
        rank=4,
        update_proj_gap=2,
        subspace=galore_optax.subspace.power(),
    )
    clip = layerwise.clip_by_projected_norm(0.1)
    with jax.enable_x64(True):
        params = wide(parameters())
        found = []
        for form_gradients in (True, False):
            step = layerwise.make_step(
                TIED, tx, clip=clip, form_gradients=form_gradients
            )
            update = jax.jit(step.update)
            carry = params, step.init(params)
            for number in range(3):
                *carry, report = update(*carry, batches(number, count))
            found.append((*carry, report))
        assert_close(found[1], found[0], 1e-9)
        moved = jax.tree.map(lambda a, b: jnp.max(abs(a - b)), found[0][0], params)
        assert min(jax.tree.leaves(moved)) > 1e-4


def test_no_product_makes_a_gradient_that_is_never_formed() -> None:
    def products(form_gradients: bool) -> int:
        step = layerwise.make_step(MODEL, galore(), form_gradients=form_gradients)
        params = parameters()
        traced = jax.make_jaxpr(step.update)(params, step.init(params), batches(0, 1))
        matrices = {(WIDTH, HIDDEN), (HIDDEN, WIDTH)}
        return sum(
            equation.primitive.name == "dot_general"
            and equation.outvars[0].aval.shape in matrices
            for equation in all_equations(traced.jaxpr)
        )

    lifts = 2
    assert products(form_gradients=False) == lifts
    assert products(form_gradients=True) == 2 * lifts


@pytest.mark.parametrize(
    "chosen", [{"remat": False}, {"clip": layerwise.clip_by_global_norm(1.0)}]
)
def test_what_needs_the_gradients_of_layers(chosen: Any) -> None:
    with pytest.raises(ValueError, match="form_gradients=False"):
        layerwise.make_step(MODEL, galore(), form_gradients=False, **chosen)


def run_once(step: layerwise.Step, data: jax.Array) -> tuple[Any, Any]:
    params = parameters()
    params, _, report = jax.jit(step.update)(params, step.init(params), data)
    return params, report


def test_later_micro_batches_renew_no_basis() -> None:
    """Even if the first gave none: coordinates in two bases cannot be added up."""

    def sometimes(params: Any, embed: Any, x: jax.Array, batch: jax.Array) -> jax.Array:
        return jnp.where(batch[0, 0] == 0, 0.0, head(params, embed, x, batch))

    step = layerwise.make_step(layerwise.Model(embed, block, sometimes), galore())
    params = parameters()
    state = step.init(params)
    data = batches(0, 2).at[:, 0, 0].set(jnp.array([0, 1]))
    _, after, _ = jax.jit(step.update)(params, state, data)
    assert_close(stacked(after, "projector"), stacked(state, "projector"), 0.0)
    _, after, _ = jax.jit(step.update)(params, state, data[::-1])
    one, two = (stacked(s, "projector").blocks["up"]["kernel"] for s in (state, after))
    assert float(jnp.abs(one - two).max()) > 0.1


def test_clipping_by_the_global_norm_equals_optax() -> None:
    tx, limit = optax.sgd(0.1), 0.05
    clip = layerwise.clip_by_global_norm(limit)
    params, report = run_once(layerwise.make_step(MODEL, tx, clip=clip), batches(0, 1))
    whole = parameters()
    gradient = jax.grad(lambda p: loss_of(MODEL, p, batches(0, 1)[0]))(whole)
    clipped = optax.chain(optax.clip_by_global_norm(limit), tx)
    updates, _ = clipped.update(gradient, clipped.init(whole), whole)
    assert_close(params, optax.apply_updates(whole, updates))
    np.testing.assert_allclose(report.norm, optax.tree.norm(gradient), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("count", [pytest.param(1, marks=slow), 2])
def test_clipping_by_the_projected_norm(count: int) -> None:
    tx = galore_optax.galore(optax.sgd(0.1), rank=4, scale=1.0, subspace=EXACT)
    limit = 0.05
    clip = layerwise.clip_by_projected_norm(limit)
    step = layerwise.make_step(MODEL, tx, clip=clip)
    params, report = run_once(step, batches(0, count))
    whole = parameters()
    plain, _, low = plain_step(MODEL, tx)(whole, tx.init(whole), batches(0, count))
    norm = optax.tree.norm(low)
    np.testing.assert_allclose(report.norm, norm, rtol=1e-5)
    assert norm > limit
    clipped = jax.tree.map(lambda a, b: a + (b - a) * limit / norm, whole, plain)
    assert_close(params, clipped)


def test_a_norm_below_the_limit_changes_nothing() -> None:
    tx = optax.sgd(0.1)
    loose = layerwise.clip_by_projected_norm(1e3)
    clipped, _ = run_once(layerwise.make_step(MODEL, tx, clip=loose), batches(0, 1))
    free, _ = run_once(layerwise.make_step(MODEL, tx), batches(0, 1))
    assert_close(clipped, free)


@slow
def test_eight_bit_states_are_those_of_the_whole_tree() -> None:
    code = galore_optax.codes.companded(min_size=1)
    tx = galore_optax.galore_adamw8bit(RATE, rank=4, code=code, subspace=EXACT)
    step = layerwise.make_step(MODEL, tx)
    params = parameters()
    state, data = step.init(params), batches(0, 1)
    params, state, _ = jax.jit(step.update)(params, state, data)
    whole = parameters()
    whole, whole_state, _ = plain_step(MODEL, tx)(whole, tx.init(whole), data)
    assert_close(params, whole)
    codes, whole_codes = (
        jax.tree.map(lambda x: x.astype(np.int32), x)
        for x in (stacked(state, "mu"), field(whole_state, "mu"))
    )
    # A code next to the middle between two values may round either way.
    assert_close(codes, whole_codes, tolerance=1.0)


def all_equations(jaxpr: Any) -> list[Any]:
    found = list(jaxpr.eqns)
    for equation in jaxpr.eqns:
        for value in equation.params.values():
            for item in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(item, "jaxpr", item)
                found += all_equations(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("remat", [True, False])
@pytest.mark.parametrize("count", [1, 2])
def test_no_gradient_of_all_layers_exists(remat: bool, count: int) -> None:
    step = layerwise.make_step(MODEL, galore(), remat=remat)
    params = parameters()
    state = step.init(params)
    jaxpr = jax.make_jaxpr(step.update)(params, state, batches(0, count)).jaxpr
    stacks = {x.shape for x in jax.tree.leaves(params.blocks) if x.ndim == 3}
    makers = {
        equation.primitive.name
        for equation in all_equations(jaxpr)
        for variable in equation.outvars
        if variable.aval.shape in stacks
    }
    assert makers <= {"while", "scan", "jit", "pjit", "dynamic_update_slice"}
    results = [
        [variable.aval.shape for variable in equation.outvars]
        for equation in all_equations(jaxpr)
        if equation.primitive.name in ("while", "scan")
    ]
    for shapes in results:  # as often as it is a parameter, and no more
        for stack in stacks:
            assert shapes.count(stack) <= 1


def test_the_program_does_not_grow_with_the_layers() -> None:
    def size(layers: int) -> int:
        step = layerwise.make_step(MODEL, galore())
        params = jax.eval_shape(lambda: parameters(layers))
        state = jax.eval_shape(step.init, params)
        traced = jax.make_jaxpr(step.update)(params, state, batches(0, 1))
        return len(all_equations(traced.jaxpr))

    assert size(32) == size(4)


def test_states_keep_their_types() -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters())
    step = layerwise.make_step(MODEL, galore_optax.galore_adamw8bit(RATE, rank=4))
    state = jax.eval_shape(step.init, params)
    new = jax.eval_shape(step.update, params, state, batches(0, 1))
    for before, after in zip((params, state), new, strict=False):
        kinds = [
            jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)
            for tree in (before, after)
        ]
        assert kinds[0] == kinds[1]


def test_states_have_no_empty_arrays() -> None:
    """Which checkpointers refuse."""
    state = layerwise.make_step(MODEL, galore()).init(parameters())
    assert all(leaf.size for leaf in jax.tree.leaves(state))


def test_runs_under_vmap() -> None:
    step = layerwise.make_step(MODEL, galore())
    one = parameters()
    both = jax.tree.map(lambda x: jnp.stack([x, 1.1 * x]), one)
    update = jax.jit(jax.vmap(step.update, in_axes=(0, 0, None)))
    found, _, _ = update(both, jax.vmap(step.init)(both), batches(0, 1))
    alone, _, _ = jax.jit(step.update)(one, step.init(one), batches(0, 1))
    assert_close(jax.tree.map(lambda x: x[0], found), alone)


@pytest.mark.slow
def test_labels_and_masks_go_by_path() -> None:
    def labels(params: Any) -> Any:
        def label(path: Any, _: Any) -> str:
            return "low" if "blocks" in jax.tree_util.keystr(path) else "full"

        return jax.tree_util.tree_map_with_path(label, params)

    tx = optax.partition({"low": galore(), "full": optax.adam(RATE)}, labels)
    step = layerwise.make_step(MODEL, tx)
    params = parameters()
    state = step.init(params)
    new, _, _ = jax.jit(step.update)(params, state, batches(0, 1))
    plain = jax.jit(
        lambda p, s, b: tx.update(jax.grad(lambda p: loss_of(MODEL, p, b))(p), s, p)
    )
    updates, _ = plain(params, tx.init(params), batches(0, 1)[0])
    assert_close(new, optax.apply_updates(params, updates))
