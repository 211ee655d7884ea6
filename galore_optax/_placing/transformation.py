# SPDX-License-Identifier: Apache-2.0
"""A transformation that makes its state where it is to lie, and keeps it there."""

import contextlib
import dataclasses
from typing import Any

import jax
import optax

from galore_optax._context import Declared, within
from galore_optax._inner.eager import compiled
from galore_optax._placing.given import Given, check_declared, check_paths, given
from galore_optax._placing.room import refuse_without_room
from galore_optax._placing.state import Placed, placed_state, spread_over
from galore_optax._selection.leaves import Placeholder, flatten
from galore_optax._xla.sharding import Names, place


def sharded(
    tx: optax.GradientTransformation,
    params: Any,
    shardings: Any = None,
    *,
    spread: str | tuple[str, ...] = (),
) -> optax.GradientTransformationExtraArgs:
    """`tx`, with its state where `state_shardings` says, from `init` on.

    An array that is made under `jit` on a mesh of Auto axes lies where XLA likes, and a
    tracer there cannot tell where its leaf lies. Here it was said beforehand: `init`
    makes every array in its place, none at full size first, and `update` leaves it
    there, so that a step is compiled once. A projector is gathered from all devices
    beside each product with it, one leaf at a time, in eight or four bits if it is
    stored so. Under Explicit axes, whose types tell where leaves lie, it does the same.

    Args:
      tx: any transformation, with `galore` anywhere inside it.
      params: as in `state_shardings`; looked at, and not kept.
      shardings: as in `state_shardings`.
      spread: as in `state_shardings`.

    Returns:
      the transformation; its state is that of `tx`, and may be exchanged with it.
      Updates lie where the parameters do.

    Raises:
      ValueError: as `state_shardings`; a device of the mesh says that it has less
        memory than its part of the state takes; in `init` and `update`, the parameters
        are not those that were declared.

    Example:
      >>> import galore_optax, jax, jax.numpy as jnp, optax
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
      >>> params = {"kernel": jnp.ones((16, 64))}
      >>> params = jax.device_put(params, NamedSharding(mesh, P(None, "fsdp")))
      >>> tx = galore_optax.galore(optax.adam(1e-3), rank=4)
      >>> tx = galore_optax.sharded(tx, params)
      >>> state = tx.init(params)
      >>> state.count.sharding.mesh.axis_names  # counters too
      ('fsdp',)
    """
    of_params, over = given(params, shardings), spread_over(spread)
    state, places = placed_state(tx, of_params, over)
    refuse_without_room(state, places)
    kept = _Kept(tx, of_params, over, places)
    result = Placed(
        *compiled(optax.GradientTransformationExtraArgs(kept.init, kept.update))
    )
    result.tx, result.given, result.spread = tx, of_params, over
    result.shardings = places
    return result


@dataclasses.dataclass(frozen=True, eq=False)
class _Kept:
    tx: optax.GradientTransformation
    given: Given
    spread: Names
    shardings: Any  # of the state

    def init(self, params: Any) -> Any:
        if isinstance(params, Placeholder):
            return self.tx.init(params)
        check_declared(self.given, params)
        leaves = jax.tree.leaves(params)
        if any(isinstance(x, jax.core.Tracer) for x in leaves):
            return self._init(params)
        abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
        with jax.set_mesh(self.given.mesh):
            if abstract:
                return jax.jit(lambda: self._init(params))()
            return jax.jit(self._init)(params)

    def _init(self, params: Any) -> Any:
        with self._declared():
            return jax.tree.map(place, self.tx.init(params), self.shardings)

    def update(
        self, updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        update = optax.with_extra_args_support(self.tx).update
        with self._declared():
            found, new = update(updates, state, params, **extra_args)
            return self._like_params(found), jax.tree.map(place, new, self.shardings)

    def _declared(self) -> contextlib.AbstractContextManager[None]:
        return within(declared=Declared(self.given.leaves, self.spread))

    def _like_params(self, updates: Any) -> Any:
        flat = flatten(updates)
        check_paths(self.given, flat.paths)
        values = [place(x, self.given.leaves[path]) for path, x in flat.items()]
        return flat.rebuild(values, [True] * len(values))
