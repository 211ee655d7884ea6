# SPDX-License-Identifier: Apache-2.0
"""The state of one step as that of another, part by part."""

from typing import Any

import jax
import optax

from galore_optax import _convert
from galore_optax._context import Whole, within
from galore_optax.layerwise._parts import Params, Part, by_part


def convert_state(
    state: Params,
    old: optax.GradientTransformation,
    new: optax.GradientTransformation,
    params: Params,
) -> Params:
    """`galore_optax.convert_state` for the state of a `Step`.

    Args:
      state: of the step of `old`, as its update returned it.
      old: the transformation that `make_step` was given.
      new: the one to go on with.
      params: the parameters, or their shapes.

    Returns:
      a state for the step that `make_step` makes of `new`.

    Raises:
      ValueError: as `galore_optax.convert_state`.

    Example:
      >>> import galore_optax, jax.numpy as jnp
      >>> from galore_optax import layerwise
      >>> params = layerwise.Params(
      ...     {"embedding": jnp.ones((50, 64))}, {"kernel": jnp.ones((3, 64, 64))}, {})
      >>> model = layerwise.Model(*[lambda *_: None] * 3)
      >>> old, new = (galore_optax.galore_adamw(1e-2, rank=r) for r in (16, 8))
      >>> state = layerwise.make_step(model, old).init(params)
      >>> state = layerwise.convert_state(state, old, new, params)
      >>> state.blocks.inner_state[0].mu.blocks["kernel"].shape
      (3, 8, 64)
    """
    shapes = jax.eval_shape(lambda tree: tree, params)

    def of(part: Part) -> Any:
        alone = part.alone(_shapes(shapes, part))
        with within(whole=Whole(shapes, part.layer)):
            return _convert.convert_state(part.of(state), old, new, alone)

    return by_part(shapes, of)


def _shapes(shapes: Params, part: Part) -> Any:
    whole = getattr(shapes, part.name)
    if part.name != "blocks":
        return whole
    return jax.tree.map(lambda x: x.update(shape=x.shape[1:]), whole)
