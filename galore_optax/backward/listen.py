# SPDX-License-Identifier: Apache-2.0
"""Coordinates of a gradient from the two factors of a product, `(x P)ᵀ dy`.

    y = x W              computed as the program has it, with no gradient for W
    dZ = (x P)ᵀ dy       P on the input side of W: x P is kept for it, not x
    dZ = xᵀ (dy P)       P on the output side

so that the gradient `xᵀ dy` of the weight exists nowhere.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax._xla.sharding import explicit_sharding, varies_over
from galore_optax.backward.addend import Addend, Factored
from galore_optax.backward.named import Named, einsum


class Transpose(Protocol):
    """Static structure of what an addend adds to `y`, transposed."""

    def coordinates(self, dy: jax.Array, given: Any) -> jax.Array:
        """`dZ`, without the dtype and the layout of `Z`."""
        ...


class Product(Protocol):
    """A place where a weight meets its product."""

    def listen(self, addend: Addend) -> jax.Array:
        """The product, with coordinates for `addend`."""
        ...

    def flops(self, addend: Addend) -> tuple[int, int]:
        """What the weight's gradient takes, and what its coordinates do."""
        ...


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _listen(transpose: Transpose, y: jax.Array, given: Any, z: jax.Array) -> jax.Array:
    del transpose, given, z
    return y


def _forward(
    transpose: Transpose, y: jax.Array, given: Any, z: jax.Array
) -> tuple[jax.Array, Any]:
    del transpose, z
    return y, given


def _backward(
    transpose: Transpose, given: Any, dy: jax.Array
) -> tuple[jax.Array, None, jax.Array]:
    return dy, None, transpose.coordinates(dy, given)


_listen.defvjp(_forward, _backward)


def listen(transpose: Transpose, y: jax.Array, given: Any, z: jax.Array) -> jax.Array:
    """`y`, whose cotangent gives that of `z` too.

    Args:
      transpose: how.
      y: a result of the program, computed with a weight that has no gradient.
      given: arrays that `transpose` needs; constant to derivatives.
      z: the zero addend in coordinates.

    Returns:
      `y`; nothing is added in the forward pass.
    """
    return _listen(transpose, y, lax.stop_gradient(given), _varying_like(z, y))


def _varying_like(z: jax.Array, y: jax.Array) -> jax.Array:
    """`z`, whose cotangent inside `shard_map` is summed over the devices of `y`."""
    missing = tuple(sorted(varies_over(y) - varies_over(z)))
    return lax.pcast(z, missing, to="varying") if missing else z


@dataclasses.dataclass(frozen=True)
class _ByLetters(Transpose):
    """Of a product, or of the weight itself, by the letters of all arrays."""

    y: str
    x: str | None  # after its products with bases; None for the weight itself
    outer: tuple[str, ...]  # what each remaining basis projects
    z: str
    dtype: jnp.dtype
    sharding: Any  # of z, under an Explicit mesh
    precision: Any

    def coordinates(self, dy: jax.Array, given: Any) -> jax.Array:
        x, bases = given
        # As an optimizer projects a gradient: in no narrower dtype than coordinates.
        low = Named(dy if self.x else dy.astype(self.dtype), self.y)
        for projected, basis in zip(self.outer, bases, strict=True):
            low = low.times(basis, projected, self.precision)
        factors = [low] if self.x is None else [Named(x, self.x), low]
        dz = einsum(factors, self.z, self.dtype, self.precision, self.sharding)
        return dz.astype(self.dtype)


def dense(value: Factored) -> jax.Array:
    """The weight, whose gradient is formed and projected: a use of any kind."""
    addend = value.addend
    projected = tuple(map(addend.projected, addend.bases))
    transpose = by_letters(addend, addend.axes, None, projected, None)
    given = None, addend.bases
    return listen(transpose, value.weight, given, addend.variable.array())


def by_letters(
    addend: Addend, y: str, x: str | None, outer: Sequence[str], precision: Any
) -> Transpose:
    """`dZ` from `dy`, from `x` if there is one, and from bases that project `outer`."""
    z = addend.variable.array()
    axes, sharding = addend.variable.axes, explicit_sharding(z)
    return _ByLetters(y, x, tuple(outer), axes, z.dtype, sharding, precision)
