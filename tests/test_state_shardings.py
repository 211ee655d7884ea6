# SPDX-License-Identifier: Apache-2.0
"""Where a state is to lie: how that is asked, answered, summed up and refused."""

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
from galore_optax import memory
from galore_optax._placing import room
from tests.helpers import Tilted
from tests.meshes import AUTO, EIGHT_BIT, EXPLICIT, LR, eight, galore, is_shape, mesh_of

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
    # 8 devices, 64 columns in two blocks of eight bits.
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


@eight
def test_a_mesh_without_room_for_the_state_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params = kernel(P(None, "fsdp"), jax.make_mesh((8,), ("fsdp",), axis_types=(AUTO,)))
    tx = galore()
    held = go.describe(tx, params).per_device.bytes

    def tells(number: int) -> Any:
        return lambda device: number - 1 if device.id == 5 else 2 * number

    monkeypatch.setattr(room, "_bytes", tells(held + 1))
    go.sharded(tx, params)
    monkeypatch.setattr(room, "_bytes", tells(held))
    message = (
        r"takes 312 B on each of 8 devices, which have 311 B\. The largest part,"
        r" 'inner_state/0/mu/dense/kernel', takes 128 B: axis 1 is split over 'fsdp'\."
        r" Take a mesh with more devices"
    )
    with pytest.raises(ValueError, match=message):
        go.sharded(tx, params)


def test_devices_that_are_not_there_tell_nothing_of_their_memory() -> None:
    class Absent:
        def memory_stats(self) -> Any:
            raise NotImplementedError

    assert room._bytes(Absent()) is None
    assert room._bytes(jax.devices("cpu")[0]) is None


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
    """Within 2 %, which leaves room for counters and scales of projectors."""
    params = of_7b(abstract_mesh(size), axis)
    wide, eight_bit = go.galore_adamw, go.galore_adamw8bit
    for make, dtype in ((wide, None), (wide, jnp.int8), (eight_bit, None)):
        tx = make(LR, rank=1024, projector_dtype=dtype)
        report = go.describe(tx, params)
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


PARTS = {
    "rotated": lambda: galore(moments=go.moments.rotate()),
    "reset": lambda: galore(moments=go.moments.reset()),
    "fira": lambda: go.fira_adamw(0.1, rank=4, update_proj_gap=2),
    "golore": lambda: galore(
        subspace=go.subspace.golore(random_from=4), moments=go.moments.transfer()
    ),
    "dct": lambda: galore(subspace=go.subspace.dct(), moments=go.moments.rotate()),
    "muon": lambda: go.galore_muon(0.1, rank=4, subspace=Tilted()),
    "ldadam": lambda: go.ldadam(0.1, rank=4, subspace=Tilted()),
    "apollo": lambda: go.apollo_adamw(0.1, rank=4, update_proj_gap=2),
}


# Optax' product of a momentum with its transpose is refused under Explicit axes.
AUTO_ALONE = ["muon"]
PLACED = [(name, AUTO) for name in PARTS] + [
    (name, AxisType.Explicit) for name in PARTS if name not in AUTO_ALONE
]


@eight
@pytest.mark.parametrize(("name", "kind"), PLACED)
def test_what_moves_and_adds_is_that_of_one_device(name: str, kind: AxisType) -> None:
    """Where both axes of the weights are split."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(kind,) * 2)
    weights = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)

    def trained(params: Any, tx: Any) -> np.ndarray:
        state = jax.jit(tx.init)(params)

        @jax.jit
        def step(params: Any, state: Any) -> Any:
            updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(7):
            params, state = step(params, state)
        return np.asarray(params["w"])

    split = {"w": jax.device_put(weights, NamedSharding(mesh, P("fsdp", "tp")))}
    with jax.set_mesh(mesh):
        found = trained(split, go.sharded(PARTS[name](), split))
    expected = trained({"w": jnp.asarray(weights)}, PARTS[name]())
    # Adam divides by roots of sums of 64 terms in another order: a few roundings of
    # updates of a tenth.
    np.testing.assert_allclose(found, expected, rtol=0, atol=4 * 0.1 * 64 * 6e-8)
