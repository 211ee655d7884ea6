# SPDX-License-Identifier: Apache-2.0
"""Models of NNX, linen and Equinox, a layer at a time, without glue.

The oracle is the gradient of the framework's own whole model: plain SGD of one step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from galore_optax import layerwise

TOKENS = jnp.arange(6) % 20
LR = 0.25
# A step of gradients that are sums of some hundred f32 terms of size 1 at most.
CLOSE = {"rtol": 0, "atol": 256 * 2.0**-24}


class Case(NamedTuple):
    """A model in parts, and as a whole: functions of its own parameters."""

    parts: tuple[Any, Any, Any]
    functions: dict[str, Callable[..., Any]]
    whole: Any  # pytree of parameters
    loss: Callable[[Any], jax.Array]
    put: Callable[[Any, Any, Any], Any]  # merged parts -> a tree like whole


def mean_square(x: jax.Array) -> jax.Array:
    return jnp.mean((x - 1) ** 2)


def nnx_case(scanned: bool) -> Case:
    nnx = pytest.importorskip("flax.nnx")

    class Block(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self, rngs: Any) -> None:
            self.norm = nnx.RMSNorm(8, rngs=rngs)
            self.up = nnx.Linear(8, 16, rngs=rngs)
            self.down = nnx.Linear(16, 8, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return x + self.down(nnx.relu(self.up(self.norm(x))))

    class Model(nnx.Module):  # type: ignore[misc, name-defined]
        def __init__(self, rngs: Any) -> None:
            self.embed = nnx.Embed(20, 8, rngs=rngs)
            if scanned:
                make = nnx.split_rngs(splits=3)(nnx.vmap(Block))
                self.blocks = make(rngs)
            else:
                self.blocks = nnx.List([Block(rngs) for _ in range(3)])
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.out = nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, tokens: Any) -> Any:
            x = self.embed(tokens)
            if scanned:
                x = nnx.scan(
                    lambda x, b: b(x), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry)
                )(x, self.blocks)
            else:
                for block in self.blocks:
                    x = block(x)
            return self.out(self.norm(x))

    model = Model(nnx.Rngs(0))
    graphdef, state = nnx.split(model)

    def loss(state: Any) -> jax.Array:
        return mean_square(nnx.merge(graphdef, state)(TOKENS))

    def put(embed: Any, blocks: Any, head: Any) -> Any:
        model.embed, model.blocks = embed, blocks
        model.norm, model.out = head["norm"], head["out"]
        return nnx.state(model)

    return Case(
        (model.embed, model.blocks, {"norm": model.norm, "out": model.out}),
        {
            "embed": lambda embed, batch: embed(batch),
            "block": lambda block, x, batch: block(x),
            "head": lambda head, embed, x, batch: mean_square(
                head["out"](head["norm"](x))
            ),
        },
        state,
        loss,
        put,
    )


def linen_case(scanned: bool) -> Case:
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):  # type: ignore[misc, name-defined]
        @nn.compact
        def __call__(self, x: Any, _: Any = None) -> Any:
            y = x + nn.Dense(8)(nn.relu(nn.Dense(16)(nn.RMSNorm()(x))))
            return (y, None) if scanned else y

    class Model(nn.Module):  # type: ignore[misc, name-defined]
        def setup(self) -> None:
            self.embed = nn.Embed(20, 8)
            if scanned:
                axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
                self.blocks = nn.scan(Block, length=3, **axes)()
            else:
                self.block = [Block() for _ in range(3)]
            self.out = nn.Dense(4)

        def __call__(self, tokens: Any) -> Any:
            x = self.embed(tokens)
            if scanned:
                x, _ = self.blocks(x, None)
            else:
                for block in self.block:
                    x = block(x)
            return self.out(x)

    model = Model()
    params = model.init(jax.random.key(0), TOKENS)["params"]
    names = ["blocks"] if scanned else [f"block_{i}" for i in range(3)]
    blocks = params["blocks"] if scanned else [params[name] for name in names]

    def block(params: Any, x: Any, batch: Any) -> Any:
        y = Block().apply({"params": params}, x)
        return y[0] if scanned else y

    def put(embed: Any, blocks: Any, head: Any) -> Any:
        found = {"blocks": blocks} if scanned else dict(zip(names, blocks, strict=True))
        return {"embed": embed, "out": head, **found}

    return Case(
        (params["embed"], blocks, params["out"]),
        {
            "embed": lambda p, batch: nn.Embed(20, 8).apply({"params": p}, batch),
            "block": block,
            "head": lambda p, embed, x, batch: mean_square(
                nn.Dense(4).apply({"params": p}, x)
            ),
        },
        params,
        lambda params: mean_square(model.apply({"params": params}, TOKENS)),
        put,
    )


def equinox_case(scanned: bool) -> Case:
    eqx = pytest.importorskip("equinox")

    class Block(eqx.Module):  # type: ignore[misc, name-defined]
        norm: Any
        mlp: Any

        def __init__(self, key: Any) -> None:
            self.norm = eqx.nn.RMSNorm(8)
            self.mlp = eqx.nn.MLP(8, 8, 16, 1, use_final_bias=False, key=key)

        def __call__(self, x: Any) -> Any:
            return x + self.mlp(self.norm(x))

    class Model(eqx.Module):  # type: ignore[misc, name-defined]
        embed: Any
        blocks: Any
        out: Any

        def __call__(self, token: Any) -> Any:
            x = self.embed(token)
            for i in range(3):
                block = self.blocks
                block = (
                    jax.tree.map(lambda a, i=i: a[i] if eqx.is_array(a) else a, block)
                    if (scanned)
                    else block[i]
                )
                x = block(x)
            return self.out(x)

    keys = jax.random.split(jax.random.key(0), 5)
    blocks = eqx.filter_vmap(Block)(keys[:3]) if scanned else list(map(Block, keys[:3]))
    model = Model(
        eqx.nn.Embedding(20, 8, key=keys[3]), blocks, eqx.nn.Linear(8, 4, key=keys[4])
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def put(embed: Any, blocks: Any, head: Any) -> Any:
        parts = embed, blocks, head
        merged = eqx.tree_at(lambda m: (m.embed, m.blocks, m.out), model, parts)
        return eqx.filter(merged, eqx.is_inexact_array)

    return Case(
        (model.embed, model.blocks, model.out),
        {
            "embed": lambda embed, batch: jax.vmap(embed)(batch),
            "block": lambda block, x, batch: jax.vmap(block)(x),
            "head": lambda head, embed, x, batch: mean_square(jax.vmap(head)(x)),
        },
        params,
        lambda params: mean_square(jax.vmap(eqx.combine(params, static))(TOKENS)),
        put,
    )


CASES = {"nnx": nnx_case, "linen": linen_case, "equinox": equinox_case}


@pytest.mark.parametrize(
    ("name", "scanned"),
    [
        ("nnx", False),
        ("linen", True),
        ("equinox", True),
        pytest.param("nnx", True, marks=pytest.mark.slow),
        pytest.param("linen", False, marks=pytest.mark.slow),
        pytest.param("equinox", False, marks=pytest.mark.slow),
    ],
)
def test_a_step_is_that_of_the_whole_model(name: str, scanned: bool) -> None:
    case = CASES[name](scanned)
    structure, params = layerwise.split(*case.parts)
    assert {x.shape[0] for x in jax.tree.leaves(params.blocks)} == {3}
    step = layerwise.make_step(structure.model(**case.functions), optax.sgd(LR))
    new, _, report = step.update(params, step.init(params), TOKENS[None])
    loss, gradients = jax.value_and_grad(case.loss)(case.whole)
    np.testing.assert_allclose(report.loss, loss, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - LR * g, case.whole, gradients)
    found = case.put(*structure.merge(new))
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), found, expected
    )
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), found, case.whole)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_projected_and_vectors_are_not(name: str) -> None:
    _, params = layerwise.split(*CASES[name](False).parts)
    report = go.describe(go.galore_adamw(1e-2, rank=2), params)
    low = {leaf.path for leaf in report if leaf.rank and "blocks" in leaf.path}
    matrices = {
        leaf.path for leaf in report if len(leaf.shape) == 3 and "blocks" in leaf.path
    }
    assert low == matrices
    assert len(low) == 2


def block(**changes: Any) -> dict[str, Any]:
    return {"up": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}} | changes


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            block(up={"kernel": jnp.ones((8, 5)), "bias": jnp.ones(4)}),
            r"block 2 .*'up/kernel' is float32\[8, 5\], where block 0 .*\[8, 4\]",
        ),
        (
            block(up={"kernel": jnp.ones((8, 4))}),
            r"block 2 .*'up/bias' is nothing, where block 0 has float32\[4\]",
        ),
        (
            block(down=jnp.ones(3)),
            r"block 2 .*'down' is float32\[3\], where .* nothing",
        ),
        (
            {"up": {"kernel": jnp.ones((8, 4), jnp.bfloat16), "bias": jnp.ones(4)}},
            r"block 2 .*'up/kernel' is bfloat16\[8, 4\]",
        ),
        (block(rate=0.5), r"block 2 .*in containers of other types or fields"),
    ],
    ids=["shape", "missing", "more", "dtype", "container"],
)
def test_unequal_blocks_name_block_and_leaf(other: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layerwise.split({}, [block(), block(), other], {})


def test_what_is_no_parameter_is_named() -> None:
    with pytest.raises(ValueError, match=r"'index' is 3, where block 0 has 0"):
        layerwise.split({}, [block(index=0), block(index=3)], {})
    with pytest.raises(ValueError, match=r"'steps' of head is an array of int32"):
        layerwise.split({}, [block()], {"steps": jnp.arange(3)})
    for nothing in ([], ()):
        with pytest.raises(ValueError, match="there is no block to stack"):
            layerwise.split({}, nothing, {})
    with pytest.raises(ValueError, match="same leading layer axis"):
        layerwise.split({}, block(), {})


def test_nnx_refuses_what_a_step_would_not_advance() -> None:
    nnx = pytest.importorskip("flax.nnx")
    norm = nnx.BatchNorm(8, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"'mean' of block 0 is a BatchStat, and no par"
    ):
        layerwise.split({}, [norm], {})
    linear = [nnx.Linear(8, 8, use_bias=b, rngs=nnx.Rngs(0)) for b in (True, False)]
    with pytest.raises(ValueError, match=r"block 1 .*'bias' is nothing, where block 0"):
        layerwise.split({}, linear, {})
    drop = [nnx.Dropout(rate, deterministic=True) for rate in (0.1, 0.2)]
    pairs = [{"a": nnx.Linear(8, 8, rngs=nnx.Rngs(0)), "b": b} for b in drop]
    with pytest.raises(ValueError, match=r"block 1 .*attributes are others"):
        layerwise.split({}, pairs, {})


def test_stacks_come_apart_again() -> None:
    blocks = [jax.tree.map(lambda x, n=n: n * x, block()) for n in range(3)]
    again = layerwise.unstack(layerwise.stack(blocks))
    jax.tree.map(np.testing.assert_array_equal, again, blocks)
    shapes = jax.eval_shape(lambda: blocks)
    assert layerwise.stack(shapes)["up"]["kernel"].shape == (3, 8, 4)
