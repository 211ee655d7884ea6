# SPDX-License-Identifier: Apache-2.0
"""Products with gradients that are never formed, `GᵀX`, for all matrices in one pass.

The zero addend is `X Zᵀ` in place of `P Z`, and its derivative `GᵀX`. On the other side
of the matrix it is `G Y`: the two products of every iteration for a subspace. Columns
lie in memory as projectors do, so that a pass needs no copy of them.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax._selection.matrices import Matrix
from galore_optax._xla.sharding import (
    explicit_sharding,
    letter_sharding,
    place,
    replicated,
)
from galore_optax.backward.addend import Addend, Factored, Term
from galore_optax.backward.interpreter import Interpreter
from galore_optax.backward.loss import Traced

_COLUMN = "R"  # the axis of columns; those of leaves are lower case


class Factor(NamedTuple):
    """The axes of one leaf that columns run over, and the others of its matrices."""

    matrix: Matrix
    position: int  # among the leaves of params
    axes: tuple[int, ...]
    others: tuple[int, ...]

    def zeros(self, columns: jax.Array, leaf: Any) -> jax.Array:
        """Z: (batch axes, other axes, columns)."""
        sizes = [self.matrix.shape[axis] for axis in self.others]
        shape = (*self.matrix.batch_shape, *sizes, columns.shape[2])
        z = jnp.zeros(shape, columns.dtype)
        batch = self._letters(self.matrix.batch)
        letters = batch + self._letters(self.others) + _COLUMN
        return place(z, letter_sharding(explicit_sharding(leaf), letters))

    def addend(self, columns: jax.Array, z: jax.Array) -> Addend:
        batch = self._letters(self.matrix.batch)
        ours, others = self._letters(self.axes), self._letters(self.others)
        sizes = [self.matrix.shape[axis] for axis in self.axes]
        shape = (*self.matrix.batch_shape, *sizes, columns.shape[2])
        basis = Term(columns.reshape(shape), batch + ours + _COLUMN)
        variable = Term(z, batch + others + _COLUMN)
        return Addend(variable, (basis,), self.matrix.leaf_letters)

    def product(self, z: jax.Array, leaf: Any) -> jax.Array:
        """(matrices, entries of the other axes, columns), of the cotangent of Z."""
        z = place(z, replicated(explicit_sharding(leaf)))
        entries = math.prod(self.matrix.shape[axis] for axis in self.others)
        return z.reshape(self.matrix.count, entries, -1)

    def _letters(self, axes: Sequence[int]) -> str:
        return "".join(self.matrix.leaf_letters[axis] for axis in axes)


def products(
    program: Traced,
    values: Sequence[Any],
    factors: Sequence[Factor],
    columns: Sequence[jax.Array],
) -> list[jax.Array]:
    """`GᵀX` for each factor, in one pass.

    Args:
      program: the loss.
      values: leaves of its parameters.
      factors: of different leaves.
      columns: X of each, (matrices, entries of its axes, columns).

    Returns:
      (matrices, entries of the other axes, columns) for each.
    """

    # Activations depend on neither columns nor the turn of a loop: XLA would keep those
    # of one pass for the next, in place of memory.
    values, columns = lax.optimization_barrier((list(values), list(columns)))

    def value(variables: list[jax.Array]) -> Any:
        inputs = list(values)
        for factor, x, z in zip(factors, columns, variables, strict=True):
            leaf = values[factor.position]
            inputs[factor.position] = Factored(leaf, factor.addend(x, z))
        return program.run(Interpreter(), inputs)

    leaves = [values[factor.position] for factor in factors]
    zeros = [
        factor.zeros(x, leaf)
        for factor, x, leaf in zip(factors, columns, leaves, strict=True)
    ]
    found, _ = jax.grad(value, has_aux=True)(zeros)
    return [
        factor.product(z, leaf)
        for factor, z, leaf in zip(factors, found, leaves, strict=True)
    ]
