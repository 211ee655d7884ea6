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

WIDTH, HIDDEN, LAYERS, VOCAB, STEPS, RATE = 16, 24, 3, 50, 20, 1e-2

EPS = float(np.finfo(np.float32).eps)
# A step of at most RATE, from gradients of a hundred terms.
TOLERANCE = RATE * 100 * EPS


def parameters(layers: int = LAYERS) -> layerwise.Params:
    keys = jax.random.split(jax.random.key(0), 4)

    def normal(number: int, *shape: int) -> jax.Array:
        return 0.3 * jax.random.normal(keys[number], shape)

    blocks = {
        "up": {"kernel": normal(1, layers, WIDTH, HIDDEN)},
        "down": {"kernel": normal(2, layers, HIDDEN, WIDTH)},
        "norm": {"scale": jnp.ones((layers, WIDTH))},
    }
    head = {"lm_head": {"kernel": normal(3, WIDTH, VOCAB)}}
    return layerwise.Params({"embedding": normal(0, VOCAB, WIDTH)}, blocks, head)


def embed(params: Any, batch: jax.Array) -> jax.Array:
    return params["embedding"][batch[:, :-1]]


def block(params: Any, x: jax.Array, batch: jax.Array) -> jax.Array:
    size = jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    hidden = (x / size * params["norm"]["scale"]) @ params["up"]["kernel"]
    return x + jax.nn.silu(hidden) @ params["down"]["kernel"]


def head(params: Any, embed: Any, x: jax.Array, batch: jax.Array) -> jax.Array:
    logits = x @ params["lm_head"]["kernel"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return jnp.mean(losses)


def tied_head(params: Any, embed: Any, x: jax.Array, batch: jax.Array) -> jax.Array:
    kernel = embed["embedding"].T + params["lm_head"]["kernel"]
    return head({"lm_head": {"kernel": kernel}}, embed, x, batch)


MODEL = layerwise.Model(embed, block, head)
TIED = layerwise.Model(embed, block, tied_head)


def batches(step: int, count: int) -> jax.Array:
    return jax.random.randint(jax.random.key(step), (count, 4, 9), 0, VOCAB)


def loss_of(model: layerwise.Model, params: Any, batch: jax.Array) -> jax.Array:
    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return model.block(layer, x, batch), None

    x, _ = jax.lax.scan(body, model.embed(params.embed, batch), params.blocks)
    return model.head(params.head, params.embed, x, batch)


def plain_step(model: layerwise.Model, tx: Any) -> Any:
    """Accumulates in coordinates, the bases coming from the first micro-batch."""

    def step(params: Any, state: Any, batches: jax.Array) -> tuple[Any, Any, Any]:
        total: Any = None
        for number, batch in enumerate(batches):
            gradient = jax.grad(lambda p, b=batch: loss_of(model, p, b))(params)
            low, state = galore_optax.project_gradients(
                tx, gradient, state, params, refresh=None if number == 0 else False
            )
            low = jax.tree.map(lambda x: x / len(batches), low)
            total = low if total is None else jax.tree.map(jnp.add, total, low)
        updates, state = galore_optax.update_projected(tx, total, state, params)
        return optax.apply_updates(params, updates), state, total

    return jax.jit(step)


def assert_close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path)
        ),
        found,
        expected,
    )


def field(state: Any, name: str) -> Any:
    """Of GaLore's state, or of the Adam inside it."""
    return getattr(state if hasattr(state, name) else state.inner_state[0], name)


def stacked(state: layerwise.Params, name: str) -> layerwise.Params:
    """The same, put together from the states of the parts."""
    parts = zip(("embed", "blocks", "head"), state, strict=True)
    return layerwise.Params(*(getattr(field(x, name), part) for part, x in parts))


# Two programs differ in last bits of gradients, and bf16 may round these apart.
EXACT = galore_optax.subspace.power(product_dtype=jnp.float32)


def galore(**options: Any) -> Any:
    schedule = optax.linear_schedule(RATE, RATE / 2, STEPS)
    return galore_optax.galore_adamw(
        schedule,
        rank=4,
        update_proj_gap=8,
        weight_decay=0.1,
        subspace=EXACT,
        **options,
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


def skip_large(updates: Any, params: Any = None) -> Any:
    """Mixes leaves by a predicate alone."""
    large = optax.tree.norm(updates) > 1
    return jax.lax.cond(large, optax.tree.zeros_like, lambda x: x, updates)


@pytest.mark.parametrize(
    "tx",
    [
        optax.clip_by_global_norm(1.0),
        optax.stateless(skip_large),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
        galore_optax.galore(
            optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), rank=4
        ),
        optax.apply_if_finite(optax.adam(1e-3), 3),
        optax.contrib.prodigy(),
    ],
)
def test_a_transformation_that_mixes_leaves_is_refused(tx: Any) -> None:
    with pytest.raises(ValueError, match=r"several leaves at once.*'embed/embedding'"):
        layerwise.make_step(MODEL, tx).init(parameters())


@pytest.mark.parametrize(
    "tx",
    [optax.lamb(1e-3), optax.adafactor(1e-3), optax.adaptive_grad_clip(0.1)],
)
def test_a_transformation_leaf_by_leaf_is_taken(tx: Any) -> None:
    layerwise.make_step(MODEL, tx).init(parameters())


@pytest.mark.one_device
def test_large_leaves_do_not_mix() -> None:
    """As a 7B model has them; what is arranged for one device must not tie leaves."""

    def shape(*axes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, *axes), jnp.float32)

    kernels = {f"w{i}": {"kernel": shape(4096, 4096)} for i in range(3)}
    blocks = kernels | {"norm": {"scale": shape(4096)}}
    shapes = jax.eval_shape(parameters)._replace(blocks=blocks)
    step = layerwise.make_step(MODEL, galore())
    jax.eval_shape(step.init, shapes)


def test_bad_models_and_batches_are_named() -> None:
    tx, params, data = optax.sgd(0.1), parameters(), batches(0, 2)
    step = layerwise.make_step(MODEL, tx, clip=layerwise.clip_by_global_norm(1.0))
    with pytest.raises(ValueError, match="with 2 micro-batches"):
        step.update(params, step.init(params), data)
    ragged = params._replace(blocks={"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))})
    with pytest.raises(ValueError, match=r"layer axis; found a \[3\], b \[4\]"):
        layerwise.make_step(MODEL, tx).init(ragged)
    whole = MODEL._replace(head=lambda params, embed, x, batch: x)
    step = layerwise.make_step(whole, tx)
    with pytest.raises(TypeError, match="scalar"):
        step.update(params, step.init(params), data)
    counted = MODEL._replace(embed=lambda params, batch: batch)
    step = layerwise.make_step(counted, tx)
    with pytest.raises(TypeError, match=r"int32.*floating-point"):
        step.update(params, step.init(params), data)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"tx=.*no optax.GradientTransformation"):
        layerwise.make_step(MODEL, optax.adam)
    with pytest.raises(TypeError, match=r"clip=1.0 is no clipping"):
        layerwise.make_step(MODEL, optax.sgd(0.1), clip=1.0)
    with pytest.raises(ValueError, match="max_norm=0 must be positive"):
        layerwise.clip_by_global_norm(0)
    layers_projected = galore_optax.galore(
        optax.sgd(0.1),
        rank=2,
        weight_dimension_numbers=galore_optax.match_paths(
            {"blocks/up": optax.contrib.MuonDimensionNumbers(0, 2), ".*": None}
        ),
    )
    step = layerwise.make_step(MODEL, layers_projected)
    with pytest.raises(ValueError, match=r"'blocks/up/kernel'.*stack of layers"):
        step.init(parameters())


@pytest.mark.parametrize("count", [1, 2])
def test_extra_arguments_reach_the_transformation(count: int) -> None:
    tx = galore_optax.galore(optax.adam(RATE), rank=4)
    step, params = layerwise.make_step(MODEL, tx), parameters()
    state = step.init(params)

    def bases(refresh: Any) -> Any:
        def update(params: Any, state: Any, batches: Any) -> Any:
            return step.update(params, state, batches, refresh=refresh)[1]

        return jax.jit(update)(params, state, batches(0, count)).blocks.projector

    kept, renewed = bases(False), bases(None)
    jax.tree.map(np.testing.assert_array_equal, kept, state.blocks.projector)
    assert not np.array_equal(*(jax.tree.leaves(x)[0] for x in (kept, renewed)))


def test_what_the_batches_of_a_step_must_be() -> None:
    tx = galore_optax.galore(optax.adam(RATE), rank=4)
    step, params = layerwise.make_step(MODEL, tx), parameters()
    state, two = step.init(params), batches(0, 2)
    with pytest.raises(ValueError, match=r"micro-batches.*\['tokens'\] \(2, 4, 9\)"):
        step.update(params, state, {"tokens": two, "mask": two[0]})
    with pytest.raises(ValueError, match="refresh=True with 2 micro-batches"):
        step.update(params, state, two, refresh=True)
