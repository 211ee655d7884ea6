# SPDX-License-Identifier: Apache-2.0
"""One forward and one backward pass, in which no gradient outlives its use.

    forward    x -> block -> x -> ... -> loss         keeps each layer's input
    backward   head, layers last to first, embed      gradient -> use -> gone

What `use` writes is the carry of the backward loop, which XLA updates in place; as
inputs and outputs of a scan it would exist twice. Parameters belong to it where they
are updated, and only there: XLA copies what is written back, even if nothing changed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_optax.layerwise._parts import (
    EMBED,
    HEAD,
    Coordinates,
    Params,
    Part,
    at,
    block,
    layers_of,
)

# (part, gradient, its parameters, its carry) -> its new carry
Use: TypeAlias = Callable[[Part, Any, Any, Any], Any]
# (layer, function of its parameters and x, parameters, x, carry) -> coordinates of its
# gradient, derivative by x, new carry
Differentiate: TypeAlias = Callable[..., tuple[Coordinates, Any, Any]]


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


def sweep(
    model: Model,
    params_in: Callable[[Params], Params],
    carry: Params,
    batch: Any,
    weight: float,
    use: Use,
    *,
    remat: bool,
    differentiate: Differentiate | None = None,
) -> tuple[jax.Array, Params]:
    """Runs `use` on the gradient of each part.

    Args:
      model: the functions.
      params_in: the parameters, wherever they are: in the carry if `use` writes them.
      carry: what `use` writes, trees of any kind; in blocks with a leading layer axis.
      batch: handed to the functions.
      weight: factor on all gradients.
      use: called once for the embedding, for each layer and for the head; last first.
      remat: compute a layer again for its gradient, instead of keeping what is inside.
      differentiate: finds the gradients of layers in coordinates, with `remat`;
        `None` to form them.

    Returns:
      the loss, not weighted, and the new carry.
    """
    kept, params = _Kept(model.block, batch, remat), params_in(carry)
    x, embed_vjp = jax.vjp(lambda p: model.embed(p, batch), params.embed)
    _check_floating(x)
    x, inputs = lax.scan(kept.forward, x, params.blocks)
    loss, head_vjp = jax.vjp(
        lambda head, embed, x: model.head(head, embed, x, batch),
        params.head,
        params.embed,
        x,
    )
    _check_scalar(loss)
    of_head, tied, dx = head_vjp(jnp.asarray(weight, loss.dtype))

    def used(part: Part, gradient: Any, carry: Params) -> Params:
        mine = use(part, gradient, part.of(params_in(carry)), part.of(carry))
        return part.put(carry, mine)

    def back(i: jax.Array, state: tuple[Any, Params]) -> tuple[Any, Params]:
        dx, carry = state
        part = block(layers - 1 - i)
        layer, input_ = part.of(params_in(carry)), at(inputs, part.layer)
        if differentiate is None:
            gradient, dx = kept.backward(layer, input_, dx)
            return dx, used(part, gradient, carry)
        value, mine = kept.value(dx), part.of(carry)
        low, dx, mine = differentiate(part, value, layer, input_, mine)
        return dx, part.put(carry, use(part, low, layer, mine))

    layers = layers_of(params)
    dx, carry = lax.fori_loop(0, layers, back, (dx, used(HEAD, of_head, carry)))
    (of_embed,) = embed_vjp(dx)
    return loss, used(EMBED, jax.tree.map(jnp.add, of_embed, tied), carry)


def visit(carry: Params, layers: int, use: Callable[[Part, Any], Any]) -> Params:
    """Runs `use`, which takes no gradient, on each part of the carry."""

    def one(part: Part, carry: Params) -> Params:
        return part.put(carry, use(part, part.of(carry)))

    carry = one(EMBED, one(HEAD, carry))
    return lax.fori_loop(0, layers, lambda i, carry: one(block(i), carry), carry)


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

    def value(self, dy: Any) -> Callable[[Any, Any], jax.Array]:
        """A function of a layer and its input whose derivatives are those for `dy`."""

        def inner(layer: Any, x: Any) -> jax.Array:
            return optax.tree.vdot(dy, self._run(layer, x))

        return inner

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
