# SPDX-License-Identifier: Apache-2.0
"""What the page about MaxText says, on train states made and placed as MaxText does."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import galore_optax as go
from tests.layout_trees import MAXTEXT
from tests.meshes import AUTO, eight
from tests.test_documents import BLOCK, ROOT

RANK = 512
# MaxText's rules for logical axes, as far as these kernels need them.
RULES = (("embed", "fsdp"), ("mlp", "tensor"), ("layers", None), ("vocab", "tensor"))
LAYERS = 4
LEAVES = {
    "token_embedder/embedding": ((512, 64), ("vocab", "embed")),
    "decoder/layers/norm/scale": ((64, LAYERS), ("embed", "layers")),
    "decoder/layers/mlp/wi_0/kernel": ((64, LAYERS, 256), ("embed", "layers", "mlp")),
    "decoder/layers/mlp/wo/kernel": ((256, LAYERS, 64), ("mlp", "layers", "embed")),
}
# Bytes: moments of norms lie on two devices each, counters and a key on all.
REPEATED = 2 * 4 * 64 * LAYERS // 8 + 100


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    names: dict[str, Any] = {}
    for code in BLOCK.findall((Path(ROOT) / "docs" / "maxtext.md").read_text()):
        exec(compile(code, "maxtext.md", "exec"), names)
    return names


def transformation(rank: int = 16) -> Any:
    return go.galore(optax.adamw(1e-3), rank=rank)


def test_its_tree_is_projected_where_the_tree_says() -> None:
    shapes = {
        path: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for path, (shape, _, _) in MAXTEXT.items()
    }
    report = go.describe(transformation(RANK), unflatten_dict(shapes, sep="/"))
    ranks = {leaf.path: leaf.rank for leaf in report}
    wanted = {path: RANK if axes else 0 for path, (_, _, axes) in MAXTEXT.items()}
    assert ranks == wanted


def mesh() -> Any:
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AUTO, AUTO))


def place(variable: Any, on: Any) -> NamedSharding:
    """As MaxText reads metadata: names are logical, and none is the whole array."""
    names = variable.get_metadata().get("out_sharding") or ()
    return NamedSharding(on, P(*(dict(RULES)[name] for name in names)))


def model() -> nnx.Module:
    def param(shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param[Any]:
        return nnx.Param(jnp.ones(shape), out_sharding=axes, eager_sharding=False)

    def module(tree: Any) -> Any:
        if isinstance(tree, dict):
            return nnx.Dict({name: module(below) for name, below in tree.items()})
        return param(*tree)

    return module(unflatten_dict(LEAVES, sep="/"))


class TrainStateNNX(nnx.Module):
    def __init__(self) -> None:
        self.model = model()
        self.optimizer = nnx.Optimizer(self.model, transformation(), wrt=nnx.Param)


def abstract_state(on: Any) -> tuple[Any, Any, Any]:
    """The train state, the shapes of it with shardings, and these alone."""
    train_state = nnx.eval_shape(TrainStateNNX)
    _, state = nnx.split(train_state)
    shaped = jax.tree.map(
        lambda v: v.replace(
            jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place(v, on))
        ),
        state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    return train_state, shaped, jax.tree.map(lambda x: x.sharding, shaped)


def bytes_of_each(state: Any) -> set[int]:
    totals: dict[Any, int] = {}
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            totals[shard.device] = totals.get(shard.device, 0) + shard.data.nbytes
    return set(totals.values())


@eight
def test_its_nnx_state_is_split_over_all_devices(page: dict[str, Any]) -> None:
    train_state, shaped, shardings = abstract_state(mesh())
    alone = bytes_of_each(made(shardings).optimizer.opt_state)
    shardings.optimizer.opt_state = page["state_places"](
        train_state.optimizer, shaped, shardings
    )
    state = made(shardings).optimizer.opt_state
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    (each,) = bytes_of_each(state)
    assert whole / 8 <= each <= whole / 8 + REPEATED
    assert min(alone) > 3 * each  # what the page warns of
    moment = state["inner_state"][0]["mu"]["decoder"]["layers"]["mlp"]["wo"]["kernel"]
    assert (moment.shape, moment[...].sharding.spec) == (
        (256, LAYERS, 16),
        P(("tensor", "fsdp")),
    )


def made(shardings: Any) -> Any:
    return jax.jit(lambda: nnx.state(TrainStateNNX()), out_shardings=shardings)()


def linen_params() -> Any:
    leaves = {
        f"params/{path}": nn.LogicallyPartitioned(jnp.ones(shape), axes)
        for path, (shape, axes) in LEAVES.items()
    }
    return unflatten_dict(leaves, sep="/")


@eight
def test_its_linen_state_is_split_over_all_devices(page: dict[str, Any]) -> None:
    on, tx = mesh(), transformation()

    def init() -> Any:
        return TrainState.create(apply_fn=None, params=linen_params(), tx=tx)

    shapes = jax.eval_shape(init)
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(shapes), on, RULES)
    unboxed = nn.meta.unbox(shapes)
    places = page["linen_places"](tx, unboxed.params, shardings)
    state = nn.meta.unbox(jax.jit(init, out_shardings=places)())
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    (each,) = bytes_of_each(state.opt_state)
    assert whole / 8 <= each <= whole / 8 + REPEATED

    step = jax.jit(lambda s: s.apply_gradients(grads=s.params), out_shardings=places)
    after = step(state)
    assert bytes_of_each(after.opt_state) == {each}
