# SPDX-License-Identifier: Apache-2.0
"""One forward and one backward pass, in which no gradient outlives its use.

    forward    x -> block -> x -> ... -> loss         keeps each layer's input
    backward   head, layers last to first, embed      gradient -> use -> gone

The parameters and whatever `use` writes are the carry of the backward loop, which XLA
updates in place; as inputs and outputs of a scan they would exist twice.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax.layerwise._parts import EMBED, HEAD, Params, Part, at, block

# (part, gradient, parameters, what is written) -> (parameters, what is written)
Use: TypeAlias = Callable[[Part, Any, Any, Any], tuple[Any, Any]]


class Model(NamedTuple):
    """A model as functions before, in and after its repeated layers.

    `x`, what passes from layer to layer, is any tree of floating-point arrays whose
    shapes and dtypes a block keeps. Tied embeddings are read from the second argument
    of `head`; parameters that it ignores cost nothing.

    Example:
      >>> import jax.numpy as jnp
      >>> from galore_optax import layerwise
      >>> model = layerwise.Model(
      ...     embed=lambda params, batch: params["embedding"][batch["tokens"]],
      ...     block=lambda params, x, batch: x + jnp.tanh(x @ params["w"]),
      ...     head=lambda params, embed, x, batch: jnp.mean(
      ...         (x @ embed["embedding"].T) ** 2))
    """

    embed: Callable[[Any, Any], Any]  # (params.embed, batch) -> x
    block: Callable[[Any, Any, Any], Any]  # (one layer of params.blocks, x, batch) -> x
    head: Callable[[Any, Any, Any, Any], jax.Array]
    # (params.head, params.embed, x, batch) -> scalar loss


class Carry(NamedTuple):
    """What a backward pass writes."""

    params: Params
    written: Params  # of any trees; in blocks with a leading layer axis


def sweep(
    model: Model, carry: Carry, batch: Any, weight: float, use: Use, *, remat: bool
) -> tuple[jax.Array, Carry]:
    """Runs `use` on the gradient of each part.

    Args:
      model: the functions.
      carry: parameters and what `use` writes.
      batch: handed to the functions.
      weight: factor on all gradients.
      use: called once for the embedding, for each layer and for the head; last first.
      remat: compute a layer again for its gradient, instead of keeping what is inside.

    Returns:
      the loss, not weighted, and the new carry.
    """
    kept = _Kept(model.block, batch, remat)
    x, embed_vjp = jax.vjp(lambda p: model.embed(p, batch), carry.params.embed)
    _check_floating(x)
    x, inputs = lax.scan(kept.forward, x, carry.params.blocks)
    loss, head_vjp = jax.vjp(
        lambda head, embed, x: model.head(head, embed, x, batch),
        carry.params.head,
        carry.params.embed,
        x,
    )
    _check_scalar(loss)
    of_head, tied, dx = head_vjp(jnp.asarray(weight, loss.dtype))
    carry = _used(use, HEAD, of_head, carry)
    layers = len(jax.tree.leaves(inputs)[0])

    def back(i: jax.Array, state: tuple[Any, Carry]) -> tuple[Any, Carry]:
        dx, carry = state
        part = block(layers - 1 - i)
        layer = part.of(carry.params)
        gradient, dx = kept.backward(layer, at(inputs, part.layer), dx)
        return dx, _used(use, part, gradient, carry)

    dx, carry = lax.fori_loop(0, layers, back, (dx, carry))
    (of_embed,) = embed_vjp(dx)
    of_embed = jax.tree.map(jnp.add, of_embed, tied)
    return loss, _used(use, EMBED, of_embed, carry)


def visit(carry: Carry, layers: int, use: Callable[[Part, Any, Any], Any]) -> Carry:
    """Runs `use`, which takes no gradient, on each part."""

    def one(part: Part, carry: Carry) -> Carry:
        params, written = use(part, part.of(carry.params), part.of(carry.written))
        return Carry(part.put(carry.params, params), part.put(carry.written, written))

    carry = one(EMBED, one(HEAD, carry))
    return lax.fori_loop(0, layers, lambda i, carry: one(block(i), carry), carry)


def _used(use: Use, part: Part, gradient: Any, carry: Carry) -> Carry:
    params, written = use(part, gradient, part.of(carry.params), part.of(carry.written))
    return Carry(part.put(carry.params, params), part.put(carry.written, written))


class _Kept:
    """What the forward pass keeps of a layer for its backward pass."""

    def __init__(
        self, block: Callable[[Any, Any, Any], Any], batch: Any, remat: bool
    ) -> None:
        self.block, self.batch, self.remat = block, batch, remat
        self.treedef: Any = None
        self.of_layer: list[int | None] = []

    def forward(self, x: Any, layer: Any) -> tuple[Any, Any]:
        """A layer, as the body of a scan; its second result is what is kept."""
        if self.remat:
            return self._run(layer, x), x
        y, vjp = jax.vjp(self._run, layer, x)
        residuals, self.treedef = jax.tree.flatten(vjp)
        # The parameters are there anyway; stacked by the scan they would be twice.
        weights = jax.tree.leaves(layer)
        self.of_layer = [_index(x, weights) for x in residuals]
        pairs = zip(residuals, self.of_layer, strict=True)
        return y, [x for x, index in pairs if index is None]

    def backward(self, layer: Any, kept: Any, dy: Any) -> tuple[Any, Any]:
        """The gradients of a layer's parameters and of its input."""
        if self.remat:
            return jax.vjp(self._run, layer, kept)[1](dy)
        weights, others = jax.tree.leaves(layer), iter(kept)
        residuals = [
            next(others) if index is None else weights[index] for index in self.of_layer
        ]
        return jax.tree.unflatten(self.treedef, residuals)(dy)

    def _run(self, layer: Any, x: Any) -> Any:
        return self.block(layer, x, self.batch)


def _index(x: Any, weights: list[Any]) -> int | None:
    return next((i for i, weight in enumerate(weights) if weight is x), None)


def _check_floating(x: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            name = jax.tree_util.keystr(path) or "the result"
            raise TypeError(
                f"{name} of embed is {leaf.dtype}, but what passes from layer to layer"
                " must be floating-point. Blocks read positions, masks and the like"
                " from batch."
            )


def _check_scalar(loss: Any) -> None:
    if loss.shape != ():
        raise TypeError(
            f"head returned an array of shape {loss.shape}; it must return the scalar"
            " loss, such as jnp.mean(losses)."
        )
