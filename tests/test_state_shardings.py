# SPDX-License-Identifier: Apache-2.0
"""Every array of a state lies where it was declared to lie, and stays there."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_optax as go
from galore_optax import layerwise, memory
from tests.helpers import Tilted, normal_like

eight = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
LR, STEPS, GAP, RANK = 0.01, 10, 4, 4  # of ten steps the first and two more refresh
SHAPES = {
    "embedding": (64, 16),
    "layers": {"up": {"kernel": (4, 16, 32)}, "norm": {"scale": (4, 16)}},
    "w": (48, 16),
}
# std projects the shorter axis: 16 of both kernels.
LAYOUTS = {
    "replicated": (P(), P(), P(), P()),
    "fsdp on the kept axis": (P("fsdp"), P(None, None, "fsdp"), P(), P("fsdp")),
    "fsdp on the projected axis": (
        *(P(None, "fsdp"), P(None, "fsdp"), P(None, "fsdp"), P(None, "fsdp")),
    ),
    "tensor": (P(None, "tp"), P(None, None, "tp"), P(), P("tp")),
    "fsdp and tensor": (
        *(P("tp", "fsdp"), P(None, "fsdp", "tp"), P(None, "fsdp"), P("fsdp", "tp")),
    ),
    "layers": (P("fsdp"), P("fsdp"), P("fsdp"), P("fsdp", "tp")),
}
# With eps the derivative of Adam's direction is at most 1 / eps.
ADAM = optax.adamw(LR, eps=1e-2, weight_decay=0.1)
EIGHT_BIT = go.quantized(ADAM, code=go.codes.companded(min_size=1))


def galore(inner: Any = ADAM, **options: Any) -> Any:
    return go.galore(
        inner, rank=RANK, update_proj_gap=GAP, subspace=Tilted(), **options
    )


FORMATS: dict[str, Callable[[], Any]] = {
    "f32": galore,
    "8bit": lambda: galore(EIGHT_BIT),
    "int8": lambda: galore(projector_dtype=jnp.int8),
}


def is_shape(x: Any) -> bool:
    return type(x) is tuple


def mesh_of(kind: AxisType, sizes: tuple[int, int] = (4, 2)) -> Any:
    return jax.make_mesh(sizes, ("fsdp", "tp"), axis_types=(kind, kind))


def placed_on(mesh: Any, layout: str) -> Any:
    """A tree of shardings, each spelled as JAX itself would."""
    _, structure = jax.tree.flatten(SHAPES, is_leaf=is_shape)
    specs = [LAYOUTS[layout][i] for i in (0, 2, 1, 3)]  # norm before up
    shapes = jax.tree.leaves(SHAPES, is_leaf=is_shape)
    if AxisType.Explicit in mesh.axis_types:
        pairs = zip(specs, shapes, strict=True)
        specs = [P(*s, *[None] * (len(x) - len(s))) for s, x in pairs]
    return structure.unflatten([NamedSharding(mesh, spec) for spec in specs])


def parameters() -> Any:
    return normal_like(jax.tree.map(jnp.zeros, SHAPES, is_leaf=is_shape), 0)


def abstract(shardings: Any) -> Any:
    return jax.tree.map(
        lambda shape, place: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place),
        SHAPES,
        shardings,
        is_leaf=is_shape,
    )


def gradients(step: int) -> Any:
    return normal_like(jax.tree.map(jnp.zeros, SHAPES, is_leaf=is_shape), step + 1)


def stepping(tx: Any) -> Any:
    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return state, optax.apply_updates(params, updates)

    return jax.jit(step)


@pytest.fixture(scope="module")
def alone() -> Callable[[str], Any]:
    """The parameters that one device ends with."""
    found: dict[str, Any] = {}

    def run(name: str) -> Any:
        if name not in found:
            tx, params = FORMATS[name](), parameters()
            state, step = tx.init(params), stepping(tx)
            for number in range(STEPS):
                state, params = step(gradients(number), state, params)
            found[name] = jax.device_get(params)
        return found[name]

    return run


def assert_lies(state: Any, shardings: Any) -> None:
    found = jax.tree_util.tree_leaves_with_path(state)
    for (path, x), place in zip(found, jax.tree.leaves(shardings), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim), (
            jax.tree_util.keystr(path),
            x.sharding,
            place,
        )


# Sums in another order are off by 64 roundings of entries below 5, which 1/eps, the
# step size, scale and ten steps make 64 * 5 * 2^-24 / 1e-2 * LR * 0.25 * 10 < 5e-5. A
# code may follow a rounding: it is 1/127 of a block, as is what a step makes of it.
TOLERANCES = {"f32": 5e-5, "8bit": LR / 127, "int8": LR / 127}
CHEAP = [
    ("replicated", AUTO, "f32", "fsdp"),
    ("fsdp on the kept axis", AUTO, "f32", ()),
    ("fsdp on the kept axis", AUTO, "8bit", ()),
    ("fsdp on the kept axis", AUTO, "int8", ()),
    ("fsdp on the projected axis", AUTO, "f32", ()),
    ("fsdp on the projected axis", AUTO, "int8", "tp"),
    ("layers", AUTO, "8bit", ()),
    ("fsdp and tensor", EXPLICIT, "f32", ()),
    ("fsdp on the kept axis", EXPLICIT, "8bit", ()),
    ("layers", EXPLICIT, "f32", "tp"),
    ("layers", EXPLICIT, "int8", ()),
]
ALL = [
    (layout, kind, name, ())
    for layout in LAYOUTS
    for kind in (AUTO, EXPLICIT)
    for name in FORMATS
]


def cases() -> list[Any]:
    slow = [case for case in ALL if case not in CHEAP]
    return [
        *(
            pytest.param(*x, id=f"{x[0]}-{x[1].name}-{x[2]}-{x[3] or None}")
            for x in CHEAP
        ),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in slow),
    ]


@eight
@pytest.mark.parametrize(("layout", "kind", "name", "spread"), cases())
def test_a_state_stays_and_its_numbers_are_those_of_one_device(
    layout: str, kind: AxisType, name: str, spread: Any, alone: Any
) -> None:
    mesh = mesh_of(kind)
    places = placed_on(mesh, layout)
    params = jax.device_put(parameters(), places)
    tx = go.sharded(FORMATS[name](), params, spread=spread)
    declared = go.state_shardings(FORMATS[name](), params, spread=spread)
    step = stepping(tx)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(params)
        assert_lies(state, declared)
        for number in range(STEPS):
            grads = jax.device_put(gradients(number), places)
            state, params = step(grads, state, params)
            assert_lies((state, params), (declared, places))
    assert step._cache_size() == 1
    for ours, theirs in zip(*map(jax.tree.leaves, (params, alone(name))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCES[name])


def collectives(text: str) -> set[str]:
    """Such as `all-gather f32[4,16,4]`."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= \(?(\w+\[[\d,]*\]).*? ({kinds})(?:-start)?\(", text)
    return {f"{kind} {shape}" for shape, kind in found}


@eight
@pytest.mark.optimized
@pytest.mark.parametrize(
    ("name", "gathered"),
    [
        ("f32", {"f32[4,16,4]", "f32[16,4]"}),
        # As codes. XLA has no bf16 on CPU: scales are moved as f32.
        ("int8", {"s8[4,16,4]", "s8[16,4]", "s8[4,1,4]", "f32[4,1,4]"}),
    ],
)
def test_a_steady_step_gathers_projectors_and_nothing_else(
    name: str, gathered: set[str]
) -> None:
    params = abstract(placed_on(mesh_of(AUTO), "fsdp on the kept axis"))
    tx = go.sharded(FORMATS[name](), params)
    state = like(tx, params)

    def step(grads: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(grads, state, params, refresh=False)
        return optax.apply_updates(params, updates), state

    text = jax.jit(step).lower(params, state, params).compile().as_text()
    assert collectives(text) == {f"all-gather {shape}" for shape in gathered}


def like(tx: Any, params: Any) -> Any:
    """The state of `tx` as shapes, in its places."""
    shapes = jax.eval_shape(tx.init, params)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        shapes,
        go.state_shardings(tx, params),
    )


@eight
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_init_makes_nothing_at_full_size(kind: AxisType) -> None:
    mesh = mesh_of(kind)
    params = abstract(placed_on(mesh, "fsdp on the kept axis"))
    tx = go.sharded(galore(), params)
    with jax.set_mesh(mesh):
        compiled = jax.jit(tx.init).lower(params).compile()
    text = compiled.as_text()
    for full in ("f32[4,16,4]", "f32[4,4,32]", "f32[48,4]", "f32[64,16]"):
        assert full not in text
    held = go.describe(tx, params).per_device
    assert held is not None
    sizes = compiled.memory_analysis()
    arrays = len(jax.tree.leaves(tx.init(params)))  # a pointer each, and no more
    assert sizes.output_size_in_bytes <= held.bytes + 8 * arrays
    assert sizes.temp_size_in_bytes <= 16


@eight
def test_eager_init_and_update_lie_alike() -> None:
    places = placed_on(mesh_of(AUTO), "fsdp on the projected axis")
    params = jax.device_put(parameters(), places)
    tx = go.sharded(galore(), params)
    state = tx.init(params)
    assert_lies(state, go.state_shardings(tx, params))
    updates, after = tx.update(params, state, params)
    assert_lies((updates, after), (places, go.state_shardings(tx, params)))


@eight
@pytest.mark.parametrize("spread", [(), "tp"])
def test_gradients_may_lie_elsewhere(spread: Any) -> None:
    mesh = mesh_of(AUTO)
    places = placed_on(mesh, "fsdp on the kept axis")
    params = jax.device_put(parameters(), places)
    tx = go.sharded(galore(), params, spread=spread)
    state = jax.jit(tx.init)(params)
    grads = jax.device_put(gradients(0), NamedSharding(mesh, P(None, "tp")))
    updates, after = jax.jit(tx.update)(grads, state, params)
    assert_lies((updates, after), (places, go.state_shardings(tx, params)))


@eight
def test_shardings_serve_as_those_of_any_init() -> None:
    """Around `galore` and inside: a chain, accumulated gradients, adafactor."""
    params = abstract(placed_on(mesh_of(AUTO), "fsdp and tensor"))
    tx = go.MultiSteps(
        optax.chain(optax.clip(1.0), go.galore_adafactor(LR, rank=RANK, b1=0.9)), 2
    ).gradient_transformation()
    places = go.state_shardings(tx, params)
    shapes = jax.eval_shape(
        tx.init, abstract(jax.tree.map(lambda x: None, SHAPES, is_leaf=is_shape))
    )
    assert jax.tree.structure(places) == jax.tree.structure(shapes)
    assert places.acc_grads == jax.tree.map(lambda x: x.sharding, params)
    assert places.inner_opt_state[1].projector["w"].spec == P(("tp", "fsdp"))


MATRIX = {"dense": {"kernel": (16, 64)}}


def abstract_mesh(size: int = 8, kind: AxisType = AUTO) -> Any:
    return AbstractMesh((size,), ("fsdp",), axis_types=(kind,))


def kernel(spec: P, mesh: Any = None, shape: Any = (16, 64)) -> Any:
    sharding = NamedSharding(mesh or abstract_mesh(), spec)
    return {
        "dense": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}
    }


def specs(places: Any) -> tuple[P, P]:
    """Of the projector and of the first moment."""
    projector = jax.tree.leaves(places.projector)[0]
    return projector.spec, jax.tree.leaves(places.inner_state[0].mu)[0].spec


def test_boxes_of_linen_name_axes_of_a_mesh() -> None:
    tx, shape = galore(), jax.ShapeDtypeStruct((16, 64), jnp.float32)
    expected = P("fsdp"), P(None, "fsdp")
    box = nn.Partitioned(shape, (None, "fsdp"), mesh=abstract_mesh())
    places = go.state_shardings(tx, {"dense": {"kernel": box}})
    assert specs(places) == expected
    logical = nn.LogicallyPartitioned(
        shape,
        ("embed", "mlp"),
        mesh=abstract_mesh(),
        rules=(("mlp", "fsdp"), ("embed", None)),
    )
    assert specs(go.state_shardings(tx, {"dense": {"kernel": logical}})) == expected
    unknown = nn.LogicallyPartitioned(shape, ("embed", "mlp"), mesh=abstract_mesh())
    with pytest.raises(
        ValueError, match=r"'dense/kernel' .* 'embed', .*logical_to_mesh"
    ):
        go.state_shardings(tx, {"dense": {"kernel": unknown}})


@eight
def test_a_box_takes_the_mesh_that_is_set() -> None:
    box = nn.Partitioned(jax.ShapeDtypeStruct((16, 64), jnp.float32), (None, "fsdp"))
    with jax.set_mesh(mesh_of(AUTO)):
        places = go.state_shardings(galore(), {"dense": {"kernel": box}})
    assert specs(places) == (P("fsdp"), P(None, "fsdp"))
    assert places.count.mesh == mesh_of(AUTO)


@eight
def test_a_state_of_nnx_names_axes_in_its_variables() -> None:
    def model() -> Any:
        init = nnx.with_partitioning(nnx.initializers.ones_init(), (None, "fsdp"))
        return nnx.Linear(16, 64, kernel_init=init, use_bias=False, rngs=nnx.Rngs(0))

    tx = galore()
    with jax.set_mesh(mesh_of(AUTO)):
        params = nnx.state(nnx.eval_shape(model), nnx.Param)
        places = go.state_shardings(tx, params)
        made = nnx.state(model(), nnx.Param)
    assert specs(places) == (P("fsdp"), P(None, "fsdp"))
    assert specs(go.state_shardings(tx, made)) == (P("fsdp"), P(None, "fsdp"))


def test_shardings_beside_shapes_may_be_a_prefix() -> None:
    shapes = {"dense": {"kernel": jax.ShapeDtypeStruct((16, 64), jnp.float32)}}
    split = NamedSharding(abstract_mesh(), P(None, "fsdp"))
    whole = go.state_shardings(galore(), shapes, {"dense": {"kernel": split}})
    assert specs(whole) == (P("fsdp"), P(None, "fsdp"))
    assert go.state_shardings(galore(), shapes, split) == whole
    assert go.state_shardings(galore(), shapes, {"dense": split}) == whole


class DimensionNumbers(NamedTuple):
    """As MaxText's."""

    reduction_axis: Any = 0
    output_axis: Any = 1
    sharding: Any = None


def test_dimension_numbers_may_have_a_sharding() -> None:
    shapes = {"w": jax.ShapeDtypeStruct((16, 64), jnp.float32)} | kernel(P())
    split = NamedSharding(abstract_mesh(), P(None, "fsdp"))
    numbers = {"w": DimensionNumbers(sharding=split), "dense": None}
    places = go.state_shardings(
        galore(weight_dimension_numbers=numbers), shapes, numbers
    )
    assert specs(places) == (P("fsdp"), P())
    assert places.inner_state[0].mu["w"].spec == P(None, "fsdp")


def test_an_axis_that_cannot_be_split_is_not() -> None:
    """12 rows over 8 devices: the stack takes them, or nothing does."""
    tx = galore()
    single = go.state_shardings(tx, kernel(P(None, "fsdp"), shape=(12, 64)))
    assert specs(single) == (P(), P(None, "fsdp"))
    stack = {"layers": kernel(P(None, None, "fsdp"), shape=(8, 12, 64))}
    assert specs(go.state_shardings(tx, stack)) == (P("fsdp"), P(None, None, "fsdp"))
    # Fewer blocks of codes than devices: scales are whole, codes are not.
    codes, scales, zeros = go.state_shardings(
        galore(projector_dtype=jnp.int4), kernel(P(None, "fsdp"))
    ).projector["dense"]["kernel"]
    assert (codes.spec, scales.spec, zeros.spec) == (P("fsdp"), P(), P())
    # 8 devices, 64 columns in one block of eight bits.
    mu = go.state_shardings(galore(EIGHT_BIT), kernel(P(None, "fsdp")))
    codes, scales = mu.inner_state[0].mu["dense"]["kernel"]
    assert (codes.spec, scales.spec) == (P(None, "fsdp"), P())


def test_leaves_without_a_matrix_lie_like_their_parameter() -> None:
    params = kernel(P(None, "fsdp")) | {
        "embedding": kernel(P("fsdp"))["dense"]["kernel"]
    }
    places = go.state_shardings(galore(), params)
    assert places.inner_state[0].nu["embedding"].spec == P("fsdp")
    alone = go.state_shardings(optax.adam(LR), params)
    assert alone[0].nu["dense"]["kernel"].spec == P(None, "fsdp")
    assert alone[0].count.spec == P()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (MATRIX, r"'dense/kernel' lies on no mesh.*device_put"),
        (
            kernel(P("fsdp"), shape=(12, 64)),
            r"axis 0 of 'dense/kernel', 12 long, .* 'fsdp' into 8 equal parts.*pad",
        ),
        (
            kernel(P("fsdp")) | {"norm": kernel(P(), abstract_mesh(4))["dense"]},
            r"'norm/kernel' lies on Mesh\(fsdp=4\) and 'dense/kernel' on .*\(fsdp=8\)",
        ),
        (
            kernel(
                P("a"), AbstractMesh((2, 2), ("a", "b"), axis_types=(AUTO, EXPLICIT))
            ),
            r"mesh of 'dense/kernel'.*all Auto or all Explicit",
        ),
    ],
)
def test_what_is_wrong_is_named(params: Any, message: str) -> None:
    if params is MATRIX:
        params = jax.tree.map(jnp.ones, params, is_leaf=is_shape)
    for function in (go.state_shardings, go.sharded):
        with pytest.raises(ValueError, match=message):
            function(galore(), params)


def test_spread_names_an_axis_of_the_mesh() -> None:
    with pytest.raises(ValueError, match=r"spread='data' is no axis.*\['fsdp'\]"):
        go.state_shardings(galore(), kernel(P()), spread="data")


def test_sharded_is_for_the_parameters_that_it_was_told_of() -> None:
    tx = go.sharded(galore(), kernel(P(None, "fsdp")))
    with pytest.raises(ValueError, match=r"differ in .*'other'.*sharded\(tx, params\)"):
        tx.init({"other": jnp.ones((16, 64))})
    with pytest.raises(ValueError, match=r"'dense/kernel' is \(16, 64\).* \(16, 32\)"):
        tx.init({"dense": {"kernel": jnp.ones((16, 32))}})


def test_layerwise_takes_the_transformation_itself() -> None:
    model = layerwise.Model(
        embed=lambda params, batch: batch,
        block=lambda params, x, batch: x @ params["up"]["kernel"],
        head=lambda params, embed, x, batch: x.sum(),
    )
    blocks = {"up": {"kernel": jnp.ones((2, 16, 16))}}
    params = layerwise.Params({}, blocks, {})
    lying = NamedSharding(abstract_mesh(), P())
    step = layerwise.make_step(model, go.sharded(galore(), params, lying))
    with pytest.raises(ValueError, match="layerwise"):
        step.init(params)


def of_7b(mesh: Any, axis: int) -> Any:
    """LLaMA-7B, every matrix split along its last axis but one, or its last."""
    shapes = memory.shapes(memory.Sizes.load("7b"))

    def one(x: Any) -> Any:
        spec = [None] * len(x.shape)
        matrix = len(spec) > 1 and x.shape[axis] % mesh.size == 0  # no stacked norm
        spec[axis if matrix else -1] = "fsdp"
        return x.update(sharding=NamedSharding(mesh, P(*spec)))

    return jax.tree.map(one, shapes)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("size", [1, 2, 8, 16, 64])
def test_each_device_has_its_share_of_7b(size: int, axis: int) -> None:
    """Within 2 %, which leaves room for counters and the factors of eight bits."""
    params = of_7b(abstract_mesh(size), axis)
    for options in ({}, {"projector_dtype": jnp.int8}):
        report = go.describe(go.galore_adamw(LR, rank=1024, **options), params)
        assert report.per_device is not None
        assert report.per_device.devices == size
        share = report.state_bytes / size
        assert share <= report.per_device.bytes <= 1.02 * share


def test_describe_says_what_each_device_holds() -> None:
    tx = galore()
    params = kernel(P(None, "fsdp"))
    report = go.describe(tx, params)
    # A projector of 16 x 4, two moments of 4 x 64, all in f32, over eight devices; two
    # counters, a key of two words and two counters of the matrix on every device.
    whole = 4 * (2 + 2 + 2)
    assert report.per_device == (8, 4 * (16 * 4 + 2 * 4 * 64) // 8 + whole, whole)
    line = "on each of 8 devices: 312 B of state, of which 24 B the same on all"
    assert line in str(report)
    assert go.describe(go.sharded(tx, params), params).per_device == report.per_device
    bare = jax.tree.map(lambda x: x.update(sharding=None), params)
    assert go.describe(tx, bare).per_device is None
    assert "devices" not in str(go.describe(tx, bare))


@eight
def test_a_checkpoint_moves_to_another_mesh(tmp_path: Any) -> None:
    checkpoint = pytest.importorskip("orbax.checkpoint")
    params = jax.device_put(parameters(), placed_on(mesh_of(AUTO), "layers"))
    state = go.sharded(galore(), params).init(params)
    other = abstract(placed_on(mesh_of(AUTO, (2, 4)), "fsdp and tensor"))
    with checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        target = like(go.sharded(galore(), other), other)
        restored = checkpointer.restore(tmp_path / "state", target)
    assert_lies(restored, go.state_shardings(galore(), other))
    for ours, theirs in zip(*map(jax.tree.leaves, (restored, state)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
