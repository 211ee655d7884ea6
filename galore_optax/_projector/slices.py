# SPDX-License-Identifier: Apache-2.0
"""A product with the projectors of a stack, a few of its layers at a time.

Projectors that are gathered from all devices, or decoded, exist whole for as long as
the product with them. Of LLaMA-7B those of one leaf are 268 MB at rank 1024, on a mesh
of any size, where the largest leaf itself is 45 MB on each of 64 devices.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from galore_optax._placing import rules
from galore_optax._placing.declared import spread
from galore_optax._selection.matrices import Matrix, Side
from galore_optax._xla.sharding import names_of, place

# Of projectors in one turn: four layers of LLaMA-7B, 33.5 MB.
GATHERED_BYTES = 2**25

# (projector, other operand) -> their product
Multiply: TypeAlias = Callable[[Any, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Slices:
    """A stack cut along a batch axis, which no array of the product has split."""

    letter: str  # of the axis, in the equation of the product
    count: int  # slices, all of one size

    def multiply(
        self,
        equation: str,
        product: Multiply,
        operands: tuple[Any, jax.Array],
        lying: NamedSharding | None,
    ) -> jax.Array:
        """`product`, slice by slice, into an array that lies by `lying`."""
        *of_operands, of_result = (
            letters.index(self.letter) for letters in re.split(",|->", equation)
        )

        def turn(i: jax.Array, result: jax.Array) -> jax.Array:
            parts = map(lambda x, axis: self._part(x, axis, i), operands, of_operands)
            part = product(*parts)
            start = i * part.shape[of_result]
            return lax.dynamic_update_slice_in_dim(result, part, start, of_result)

        shape = jax.eval_shape(
            lambda x, y: product(*map(self._part, (x, y), of_operands)), *operands
        )
        sizes = list(shape.shape)
        sizes[of_result] *= self.count
        empty = place(jnp.zeros(sizes, shape.dtype), lying)
        return lax.fori_loop(0, self.count, turn, empty)

    def _part(self, arrays: Any, axis: int, number: Any = 0) -> Any:
        def one(x: jax.Array) -> jax.Array:
            size = x.shape[axis] // self.count
            return lax.dynamic_slice_in_dim(x, number * size, size, axis)

        return jax.tree.map(one, arrays)


def slices_of(
    matrix: Matrix, side: Side, leaf: NamedSharding, dtype: jnp.dtype
) -> Slices | None:
    """How a leaf that lies so is cut; `None` for all of it at once."""
    used = rules.used(matrix, side, leaf)
    if leaf.mesh.size == 1 or used == rules.stored(matrix, side, leaf, spread()):
        return None
    shape = matrix.projector_shape(side)
    size = math.prod(shape) * dtype.itemsize
    for number in _whole_axes(matrix, side, leaf):
        letter = matrix.leaf_letters[matrix.batch[number]]
        return _cut(letter, shape[number], size)
    return None


def _whole_axes(matrix: Matrix, side: Side, leaf: NamedSharding) -> list[int]:
    """Which batch axes are split in no array of a product."""
    of_leaf = names_of(leaf, len(matrix.shape))
    low = rules.coordinates(matrix, leaf, spread())
    of_low = names_of(low, len(matrix.coordinate_shape))
    stored = jax.tree.leaves(rules.stored(matrix, side, leaf, spread()))
    of_stored = [names_of(x, len(matrix.batch)) for x in stored]

    def whole(number: int, axis: int) -> bool:
        at = matrix.coordinate_letters.index(matrix.leaf_letters[axis])
        return not any((of_leaf[axis], of_low[at], *(x[number] for x in of_stored)))

    return [i for i, axis in enumerate(matrix.batch) if whole(i, axis)]


def _cut(letter: str, layers: int, size: int) -> Slices | None:
    counts = (n for n in range(1, layers + 1) if not layers % n)
    count = next((n for n in counts if size <= n * GATHERED_BYTES), layers)
    return Slices(letter, count) if count > 1 else None
