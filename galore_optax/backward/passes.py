# SPDX-License-Identifier: Apache-2.0
"""Products with gradients that are never formed, `X G`, for all matrices in one pass.

The zero addend is `Xᵀ Z` in place of `P Z`, and its derivative `X G`. On the other side
of the matrix it is `Y Gᵀ`: the two products of every iteration for a subspace.
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

_ROW = "R"  # the axis of rows; those of leaves are lower case


class Factor(NamedTuple):
    """The axes of one leaf that its rows run over, and the others of its matrices."""

    matrix: Matrix
    position: int  # among the leaves of params
    axes: tuple[int, ...]
    others: tuple[int, ...]

    def zeros(self, rows: jax.Array, leaf: Any) -> jax.Array:
        """Z: (batch axes, rows, other axes)."""
        sizes = [self.matrix.shape[axis] for axis in self.others]
        z = jnp.zeros((*self.matrix.batch_shape, rows.shape[1], *sizes), rows.dtype)
        letters = self._letters(self.matrix.batch) + _ROW + self._letters(self.others)
        return place(z, letter_sharding(explicit_sharding(leaf), letters))

    def addend(self, rows: jax.Array, z: jax.Array) -> Addend:
        batch = self._letters(self.matrix.batch)
        ours, others = self._letters(self.axes), self._letters(self.others)
        sizes = [self.matrix.shape[axis] for axis in self.axes]
        shape = (*self.matrix.batch_shape, rows.shape[1], *sizes)
        basis = Term(rows.reshape(shape), batch + _ROW + ours)
        variable = Term(z, batch + _ROW + others)
        return Addend(variable, (basis,), self.matrix.leaf_letters)

    def product(self, z: jax.Array, leaf: Any) -> jax.Array:
        """(matrices, rows, entries of the other axes), of the cotangent of Z."""
        z = place(z, replicated(explicit_sharding(leaf)))
        entries = math.prod(self.matrix.shape[axis] for axis in self.others)
        return z.reshape(self.matrix.count, -1, entries)

    def _letters(self, axes: Sequence[int]) -> str:
        return "".join(self.matrix.leaf_letters[axis] for axis in axes)


def products(
    program: Traced,
    values: Sequence[Any],
    factors: Sequence[Factor],
    rows: Sequence[jax.Array],
) -> list[jax.Array]:
    """`X G` for each factor, in one pass.

    Args:
      program: the loss.
      values: leaves of its parameters.
      factors: of different leaves.
      rows: X of each, (matrices, rows, entries of its axes).

    Returns:
      (matrices, rows, entries of the other axes) for each.
    """

    # Activations depend on neither rows nor the turn of a loop: XLA would keep those of
    # one pass for the next, in place of memory.
    values, rows = lax.optimization_barrier((list(values), list(rows)))

    def value(variables: list[jax.Array]) -> Any:
        inputs = list(values)
        for factor, x, z in zip(factors, rows, variables, strict=True):
            leaf = values[factor.position]
            inputs[factor.position] = Factored(leaf, factor.addend(x, z))
        return program.run(Interpreter(), inputs)

    leaves = [values[factor.position] for factor in factors]
    zeros = [
        factor.zeros(x, leaf)
        for factor, x, leaf in zip(factors, rows, leaves, strict=True)
    ]
    found, _ = jax.grad(value, has_aux=True)(zeros)
    return [
        factor.product(z, leaf)
        for factor, z, leaf in zip(factors, found, leaves, strict=True)
    ]
