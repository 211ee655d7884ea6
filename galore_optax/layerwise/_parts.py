# SPDX-License-Identifier: Apache-2.0
"""A model in three parts, and one layer of the middle one."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from galore_optax._context import Whole, within
from galore_optax._projector.coordinates import project_gradients
from galore_optax._xla.order import row_major
from galore_optax.backward.gradient import differentiated

if TYPE_CHECKING:
    from galore_optax.layerwise._places import Places


class Params(NamedTuple):
    """What is trained, in the order of the forward pass; also gradients and state.

    Example:
      >>> import jax.numpy as jnp
      >>> from galore_optax import layerwise
      >>> params = layerwise.Params(
      ...     embed={"embedding": jnp.ones((100, 8))},
      ...     blocks={"up": jnp.ones((6, 8, 32)), "down": jnp.ones((6, 32, 8))},
      ...     head={"kernel": jnp.ones((8, 100))})
    """

    embed: Any
    blocks: Any  # every leaf with a leading layer axis
    head: Any


class Part(NamedTuple):
    """One of the three, or one layer of the blocks."""

    name: str
    layer: Any  # int32 scalar; which layer, for blocks

    def of(self, parts: Params) -> Any:
        """What `parts` hold for it."""
        whole = getattr(parts, self.name)
        return at(whole, self.layer) if self.name == "blocks" else whole

    def put(self, parts: Params, value: Any) -> Params:
        """`parts` with another value for it."""
        if self.name == "blocks":
            value = put(parts.blocks, value, self.layer)
        return parts._replace(**{self.name: value})

    def alone(self, value: Any) -> Params:
        """`value` as a tree in which paths are those of the whole."""
        return Params(None, None, None)._replace(**{self.name: value})


# Of NumPy: an array of JAX would start its backends when this is imported.
EMBED, HEAD = Part("embed", np.int32(0)), Part("head", np.int32(0))


def block(layer: jax.Array) -> Part:
    return Part("blocks", layer)


def at(stack: Any, layer: jax.Array) -> Any:
    return jax.tree.map(
        lambda x: lax.dynamic_index_in_dim(x, layer, keepdims=False), stack
    )


def put(stack: Any, one: Any, layer: jax.Array) -> Any:
    return jax.tree.map(
        lambda x, y: lax.dynamic_update_index_in_dim(x, row_major(y), layer, 0),
        stack,
        one,
    )


def layers_of(params: Params) -> int:
    """How many layers the blocks have.

    Raises:
      ValueError: there are no blocks, or their leaves disagree; leaves are named.
    """
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): jnp.shape(leaf)[:1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(params.blocks)
    }
    sizes = set(found.values())
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "every leaf of params.blocks needs the same leading layer axis; found"
            f" {', '.join(f'{path} {list(size)}' for path, size in found.items())}."
            " Stack the layers with jax.tree.map(lambda *x: jnp.stack(x), *layers)."
        )
    return int(sizes.pop()[0])


def by_part(params: Params, of: Callable[[Part], Any]) -> Params:
    """What `of` returns for each part; for the blocks stacked by layer."""
    layers = jnp.arange(layers_of(params), dtype=jnp.int32)
    return Params(of(EMBED), jax.vmap(lambda i: of(block(i)))(layers), of(HEAD))


class Coordinates(NamedTuple):
    """A gradient that was never formed."""

    tree: Any  # as `project_gradients` returns it


class Optimizer(NamedTuple):
    """A transformation, run on one part at a time as if it had all."""

    tx: optax.GradientTransformationExtraArgs
    shapes: Params  # of all parameters
    places: "Places | None" = None  # where these lie, if that was declared

    def init(self, params: Params) -> Params:
        """The state of each part; that of the blocks has a leading layer axis."""

        def of(part: Part) -> Any:
            return self._in(part, lambda: self.tx.init(part.alone(part.of(params))))

        state = by_part(params, of)
        return state if self.places is None else self.places.keep_all(state)

    def update(
        self, part: Part, gradient: Any, state: Any, params: Any, **extra_args: Any
    ) -> tuple[Any, Any]:
        """New parameters and state of one part."""
        if isinstance(gradient, Coordinates):
            # What is due was renewed when they were found.
            gradient = gradient.tree
            extra_args = {k: v for k, v in extra_args.items() if k != "refresh"}
            extra_args["projected"] = True

        def run() -> tuple[Any, Any]:
            return self.tx.update(
                part.alone(gradient), state, part.alone(params), **extra_args
            )

        updates, state = self._in(part, run)
        new = optax.apply_updates(params, getattr(updates, part.name))
        return new, self._kept(part, state)

    def project(
        self, part: Part, gradient: Any, state: Any, params: Any, refresh: Any
    ) -> tuple[Any, Any]:
        """The coordinates of a gradient, and the state with the bases used."""
        if isinstance(gradient, Coordinates):
            return gradient.tree, state

        def run() -> tuple[Any, Any]:
            trees = part.alone(gradient), state, part.alone(params)
            return project_gradients(self.tx, *trees, refresh=refresh)

        low, state = self._in(part, run)
        return getattr(low, part.name), self._kept(part, state)

    def differentiate(
        self, part: Part, value: Any, params: Any, x: Any, state: Any, refresh: Any
    ) -> tuple[Coordinates, Any, Any]:
        """Of `value(params, x)`: coordinates, the derivative by x, the state."""

        def of_part(params: Params, x: Any) -> Any:
            return value(getattr(params, part.name), x)

        def run() -> Any:
            trees = part.alone(params), x, state
            return differentiated(of_part, self.tx, *trees, refresh=refresh)

        _, (low, dx), state = self._in(part, run)
        return Coordinates(getattr(low, part.name)), dx, self._kept(part, state)

    def _in(self, part: Part, run: Callable[[], Any]) -> Any:
        declared = self.places.declared if self.places else None
        with within(whole=Whole(self.shapes, part.layer), declared=declared):
            return run()

    def _kept(self, part: Part, state: Any) -> Any:
        return state if self.places is None else self.places.keep(part, state)
