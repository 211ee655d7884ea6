# SPDX-License-Identifier: Apache-2.0
"""Modules of a framework as `Model` and `Params`, and back.

Whatever is a pytree is its own module: Equinox models, parameter trees of linen. NNX
modules, which hold references, go through `nnx.split`. No framework is imported here: a
module that somebody made has imported its own.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from galore_optax._selection.leaves import named_leaves
from galore_optax.layerwise._parts import Params, layers_of
from galore_optax.layerwise._stack import stack, unstack
from galore_optax.layerwise._sweep import Model


class _Static(Protocol):
    """What a module is besides its parameters."""

    def merge(self, params: Any) -> Any:
        """The module."""
        ...


@dataclasses.dataclass(frozen=True)
class Structure:
    """What three parts are besides their parameters; made by `split`."""

    _embed: _Static
    _block: _Static
    _head: _Static
    _list: Callable[[list[Any]], Any] | None  # of blocks; None where they are a stack

    def model(
        self,
        *,
        embed: Callable[[Any, Any], Any],
        block: Callable[[Any, Any, Any], Any],
        head: Callable[[Any, Any, Any, Any], jax.Array],
    ) -> Model:
        """Functions of modules as functions of parameters.

        Args:
          embed: of the module before the blocks and a batch: what goes into the first.
          block: of one block, what goes into it, and the batch: what comes out.
          head: of the modules after and before the blocks, what comes out of the last,
            and the batch: the scalar loss.

        Returns:
          for `make_step`.
        """
        return Model(
            embed=lambda params, batch: embed(self._embed.merge(params), batch),
            block=lambda params, x, batch: block(self._block.merge(params), x, batch),
            head=lambda params, tied, x, batch: head(
                self._head.merge(params), self._embed.merge(tied), x, batch
            ),
        )

    def merge(self, params: Params) -> tuple[Any, Any, Any]:
        """The three parts with these parameters, as they were given to `split`."""
        blocks: Any = params.blocks
        if self._list is None:
            blocks = self._block.merge(blocks)
        else:
            blocks = self._list([self._block.merge(one) for one in unstack(blocks)])
        return self._embed.merge(params.embed), blocks, self._head.merge(params.head)


def split(embed: Any, blocks: Any, head: Any) -> tuple[Structure, Params]:
    """Takes the modules of a layered model apart, for training a layer at a time.

    A part is a module, a tree of modules, or a tree of parameters: of Equinox, of NNX,
    or of linen, whose blocks are called by `Block().apply({"params": block}, x)`.
    Parameters are the floating-point arrays of a tree, the `nnx.Param` of NNX.

    Args:
      embed: what comes before the blocks.
      blocks: equal ones, as a list (which is copied into a stack), or one module whose
        arrays have a leading layer axis, as `nnx.vmap`, `nn.scan` and
        `eqx.filter_vmap` make it. What differs from block to block besides parameters
        has no place; let it come with the batch.
      head: what comes after.

    Returns:
      a `Structure`, which makes the functions for `make_step` with `model(...)`, and
      modules again with `merge(params)`; and the parameters.

    Raises:
      ValueError: there is no block; blocks are unequal: the block and the leaf are
        named; a part holds arrays that are no parameters, such as running averages or
        random keys, which no step would advance.

    Example:
      >>> import galore_optax, jax, jax.numpy as jnp
      >>> from galore_optax import layerwise
      >>> blocks = [{"up": jnp.ones((8, 16)), "down": jnp.ones((16, 8))}] * 3
      >>> structure, params = layerwise.split({"table": jnp.ones((20, 8))}, blocks, {})
      >>> params.blocks["up"].shape
      (3, 8, 16)
      >>> model = structure.model(
      ...     embed=lambda embed, batch: embed["table"][batch],
      ...     block=lambda block, x, batch: x + x @ block["up"] @ block["down"],
      ...     head=lambda head, embed, x, batch: jnp.mean(x**2))
      >>> step = layerwise.make_step(model, galore_optax.galore_adamw(1e-2, rank=2))
      >>> update = jax.jit(step.update, donate_argnums=(0, 1))
      >>> params, state, report = update(
      ...     params, step.init(params), jnp.zeros((1, 4), jnp.int32))
      >>> embed, blocks, head = structure.merge(params)
      >>> len(blocks), blocks[0]["up"].shape
      (3, (8, 16))

      Of an NNX model: `split(model.embed, model.blocks, {"norm": model.norm, "out":
      model.out})`, with `block=lambda block, x, batch: block(x)`.
    """
    static_embed, of_embed = _split("embed", embed)
    static_head, of_head = _split("head", head)
    if _is_list(blocks):
        pairs = [_split(f"block {i}", block) for i, block in enumerate(blocks)]
        stacked = stack([params for _, params in pairs])
        _check_equal([static for static, _ in pairs])
        static_block, rebuild = pairs[0][0], type(blocks)
    else:
        static_block, stacked = _split("blocks", blocks)
        rebuild = None
    params = Params(of_embed, stacked, of_head)
    layers_of(params)
    return Structure(static_embed, static_block, static_head, rebuild), params


def _is_list(blocks: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    lists = (list, *([nnx.List] if nnx and hasattr(nnx, "List") else []))
    return isinstance(blocks, lists) or type(blocks) is tuple


def _split(where: str, module: Any) -> tuple[_Static, Any]:
    if _has_nnx(module):
        return _split_nnx(where, module)
    static = jax.tree.map(lambda x: None if _is_parameter(x) else x, module)
    params = jax.tree.map(lambda x: x if _is_parameter(x) else None, module)
    for path, leaf in named_leaves(static):
        if hasattr(leaf, "dtype"):
            raise ValueError(_no_parameter(where, path, f"an array of {leaf.dtype}"))
    return _Tree(static), params


def _is_parameter(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _no_parameter(where: str, path: str, what: str) -> str:
    return (
        f"'{path}' of {where} is {what}, and no parameter: a layer's step writes"
        " parameters alone. Take it out of the module, and let it come with the batch."
    )


@dataclasses.dataclass(frozen=True)
class _Tree:
    """All leaves of a tree that are no parameters, `None` in their places."""

    static: Any

    def merge(self, params: Any) -> Any:
        return jax.tree.map(
            lambda x, other: other if x is None else x,
            params,
            self.static,
            is_leaf=lambda x: x is None,
        )

    def difference(self, other: Any) -> str:
        """Where another is not equal; empty where it is."""
        mine, theirs = named_leaves(self.static), named_leaves(other.static)
        for (path, x), (_, y) in zip(mine, theirs, strict=False):
            if x is not y and x != y:
                return f"'{path}' is {y!r}, where block 0 has {x!r}"
        here: Any = jax.tree.structure(self.static)
        same = here == jax.tree.structure(other.static)
        return "" if same else "its static fields are others"


def _has_nnx(module: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return False

    def is_module(node: Any) -> bool:
        return isinstance(node, nnx.Module)

    return any(map(is_module, jax.tree.leaves(module, is_leaf=is_module)))


def _split_nnx(where: str, module: Any) -> tuple[_Static, Any]:
    from flax import nnx

    parts: Any = nnx.split(module, nnx.Param, ...)
    graphdef, params, rest = parts
    for path, variable in nnx.to_flat_state(rest):
        name = "/".join(map(str, path))
        raise ValueError(_no_parameter(where, name, f"a {type(variable).__name__}"))
    return _Graph(graphdef), nnx.to_pure_dict(params)


@dataclasses.dataclass(frozen=True)
class _Graph:
    """An NNX module without its parameters."""

    graphdef: Any

    def merge(self, params: Any) -> Any:
        from flax import nnx

        return nnx.merge(self.graphdef, nnx.State(params))

    def difference(self, other: Any) -> str:
        """Where another is not equal; empty where it is."""
        same = self.graphdef == other.graphdef
        return "" if same else "its attributes are others"


def _check_equal(statics: list[Any]) -> None:
    first = statics[0]
    for number, other in enumerate(statics[1:], 1):
        difference = (
            first.difference(other)
            if type(first) is type(other)
            else "it is of another framework"
        )
        if difference:
            raise ValueError(
                f"block {number} is not as block 0: {difference}. One block's program"
                " runs with the parameters of each: let what differs come with the"
                " batch."
            )
