# SPDX-License-Identifier: Apache-2.0
"""A refresh on a mesh: each matrix is renewed once, by one device, to the same bits."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import galore_optax as go
from galore_optax._placing.deal import Deal
from galore_optax._projector import owners
from tests.helpers import normal, normal_like
from tests.meshes import (
    ADAM,
    AUTO,
    EXPLICIT,
    RANK,
    abstract,
    collectives,
    eight,
    like,
    mesh_of,
    placed_on,
)

pytestmark = eight
ALL = ("fsdp", "tp")


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (((), ALL), 16),
        (((), ALL), 5),
        ((("tp",), ("fsdp",)), 9),
        ((("tp", "fsdp"), ()), 8),
        (((), ("tp",)), 3),
        (((), ()), 11),
    ],
)
def test_what_is_dealt_out_is_whole_and_comes_back(names: Any, count: int) -> None:
    mesh, deal = mesh_of(AUTO), Deal(ALL, (4, 2), count)
    x = jnp.arange(count * 16 * 8, dtype=jnp.int32).reshape(count, 16, 8)
    spec = P(None, *(split or None for split in names))

    def there_and_back(part: Any) -> Any:
        mine = deal.deal(part, names, -1)
        return mine, deal.collect(mine, names)

    mine, back = jax.jit(
        jax.shard_map(
            there_and_back,
            mesh=mesh,
            in_specs=spec,
            out_specs=(P(ALL), spec),
            check_vma=False,
        )
    )(x)
    np.testing.assert_array_equal(back, x)
    hands = np.asarray(mine).reshape(8, deal.each, 16, 8)
    whole = [matrix for hand in hands for matrix in hand if (matrix >= 0).all()]
    np.testing.assert_array_equal(np.unique(whole, axis=0), x)
    assert deal.each == math.ceil(count / 8)


# Two leaves of one kind that eight devices share unevenly, one of which is transposed,
# and one beside them that they share evenly.
SHAPES = {
    "one": (16, 64),
    "up": (5, 16, 64),
    "down": (3, 64, 16),
    "gate": (8, 16, 24),
}
LAYOUTS = {
    "kept": {
        "one": P(None, "fsdp"),
        "up": P(None, None, "fsdp"),
        "down": P(None, "fsdp", None),
        "gate": P(None, None, ALL),
    },
    "projected": {
        "one": P("fsdp", "tp"),
        "up": P(None, ALL, None),
        "down": P(None, None, "fsdp"),
        "gate": P("tp", "fsdp", None),
    },
    "layers": {
        "one": P(),
        "up": P(None, "tp", None),
        "down": P(),
        "gate": P(ALL, None, None),
    },
}


NUMBERS = {
    name: optax.contrib.MuonDimensionNumbers(len(shape) - 2, len(shape) - 1)
    for name, shape in SHAPES.items()
}


FORMATS = {"f32": None, "int8": jnp.int8}
METHODS = {
    "power": go.subspace.power(),
    "svd": go.subspace.svd(),
    "eigh": go.subspace.eigh(),
}


def placed(layout: str, kind: AxisType) -> tuple[Any, Any]:
    mesh = mesh_of(kind)
    specs = LAYOUTS[layout].items()
    return mesh, {name: NamedSharding(mesh, spec) for name, spec in specs}


SLOW = pytest.mark.slow


@pytest.fixture(params=["at once", "in rounds"])
def held(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large matrices each device is dealt one at a time."""
    if request.param == "in rounds":
        monkeypatch.setattr(owners, "HELD_BYTES", 0)


@pytest.mark.parametrize(
    ("held", "layout", "kind", "storage", "method"),
    [
        ("in rounds", "kept", AUTO, "f32", "power"),
        ("at once", "layers", EXPLICIT, "int8", "power"),
        pytest.param("at once", "kept", EXPLICIT, "f32", "svd", marks=SLOW),
        pytest.param("in rounds", "projected", EXPLICIT, "f32", "power", marks=SLOW),
        pytest.param("at once", "projected", AUTO, "int8", "eigh", marks=SLOW),
        pytest.param("in rounds", "layers", AUTO, "int8", "svd", marks=SLOW),
    ],
    indirect=["held"],
)
def test_bases_have_the_bits_of_one_device(
    held: None, layout: str, kind: AxisType, storage: str, method: str
) -> None:
    zeros = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    mesh, places = placed(layout, kind)
    tx = go.galore(
        ADAM,
        rank=RANK,
        subspace=METHODS[method],
        projector_dtype=FORMATS[storage],
        update_proj_gap=1,
        weight_dimension_numbers=NUMBERS,
    )
    alone, update = tx.init(zeros), jax.jit(tx.update)
    split = jax.device_put(zeros, places)
    ours = go.sharded(tx, split)
    with jax.set_mesh(mesh):
        state, ours_update = jax.jit(ours.init)(split), jax.jit(ours.update)
    for step in range(2):
        gradients = normal_like(zeros, step)
        gradients["up"] = gradients["up"].at[1].set(jnp.nan)  # is refused
        _, alone = update(gradients, alone, zeros)
        with jax.set_mesh(mesh):
            gradients = jax.device_put(gradients, places)
            _, state = ours_update(gradients, state, split)
    found = (state.projector, state.refresh), (alone.projector, alone.refresh)
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, two)
    assert state.refresh.refused["up"].tolist() == [0, 2, 0, 0, 0]


def compiled_refresh(params: Any, mesh: Any, **options: Any) -> str:
    tx = go.sharded(go.galore(ADAM, rank=RANK, **options), params)
    with jax.set_mesh(mesh):
        lowered = jax.jit(
            lambda grads, state, params: tx.update(grads, state, params, refresh=True)
        ).lower(params, like(tx, params), params)
        return lowered.compile().as_text()


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("held", "layout", "kind"),
    [
        ("in rounds", "kept", AUTO),
        ("at once", "layers", EXPLICIT),
        pytest.param("in rounds", "kept", EXPLICIT, marks=SLOW),
        pytest.param("at once", "layers", AUTO, marks=SLOW),
        pytest.param("in rounds", "projected", AUTO, marks=SLOW),
        pytest.param("at once", "projected", EXPLICIT, marks=SLOW),
    ],
    indirect=["held"],
)
def test_a_refresh_works_on_its_share_and_gathers_no_gradient(
    held: None, layout: str, kind: AxisType
) -> None:
    mesh, places = placed(layout, kind)
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=places[name])
        for name, shape in SHAPES.items()
    }
    text = compiled_refresh(params, mesh, weight_dimension_numbers=NUMBERS)
    loops = "".join(re.findall(r"= \(([^)]*)\) while\(", text))
    stacks = {int(n) for n in re.findall(rf"f32\[(\d+),16,{RANK}\]", loops)}
    # Of one kind the matrices of `up` and of `down`, and `one` with either of them,
    # are dealt out apart, one to a device at most; `gate` gives each one too.
    assert max(stacks) <= 3
    moved = collectives(text)
    dealt = {x for x in moved if x.startswith("all-to-all")}
    assert dealt or layout == "layers"
    # Of gradients nothing is gathered or summed up, but coordinates.
    shapes = [re.findall(r"\d+", x.split("[")[1]) for x in moved - dealt]
    assert not [x for x in shapes if "16" in x and {"64", "24"} & {*x}]
    # A matrix and two of its projectors to each device, of each stack, twice at most.
    entries = [math.prod(map(int, re.findall(r"\d+", x.split("[")[1]))) for x in dealt]
    assert max(entries, default=0) <= 16 * 64


@pytest.mark.optimized
def test_few_that_are_due_are_renewed_by_small_sums() -> None:
    """Staggered, a matrix or two are due in a step: nothing is dealt out for them."""
    mesh = mesh_of(AUTO)
    params = abstract(placed_on(mesh, "fsdp on the kept axis"))
    text = compiled_refresh(params, mesh, stagger=True)
    assert not [x for x in collectives(text) if x.startswith("all-to-all")]


def test_a_matrix_by_itself_is_renewed_too() -> None:
    mesh = mesh_of(AUTO)
    place = NamedSharding(mesh, P(None, ALL))
    tx = go.galore(ADAM, rank=RANK)
    w = normal(0, (16, 64))
    split = {"w": jax.device_put(w, place)}
    ours = go.sharded(tx, split)
    _, state = jax.jit(ours.update)(split, ours.init(split), split)
    _, alone = jax.jit(tx.update)({"w": w}, tx.init({"w": w}), {"w": w})
    np.testing.assert_array_equal(state.projector["w"], alone.projector["w"])
