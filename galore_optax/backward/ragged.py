# SPDX-License-Identifier: Apache-2.0
"""`ragged_dot`, the product of experts that have a run of rows each.

y[m, n] = Σ_k x[m, k] W[g(m), k, n]         g(m): the expert of row m
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax.backward.addend import Addend, Factored, Term
from galore_optax.backward.listen import Transpose, listen
from galore_optax.backward.rules import Rule, Run

# dZ[g, k, n] is summed over the rows of expert g.
_OVER_ROWS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


@dataclasses.dataclass(frozen=True)
class _PerExpert(Transpose):
    """What an addend adds to `y`, transposed."""

    letters: str  # of dZ as it is computed
    z: str
    dtype: jnp.dtype
    precision: Any

    def coordinates(self, dy: jax.Array, given: Any) -> jax.Array:
        x, sizes, outer = given
        for basis in outer:
            dy = _times(dy, basis, sizes, self.precision)
        with jax.numpy_dtype_promotion("standard"):
            common = jnp.promote_types(x.dtype, dy.dtype)
            wide = jnp.promote_types(common, self.dtype)
        dz = lax.ragged_dot_general(
            x.astype(common),
            dy.astype(common),
            sizes,
            _OVER_ROWS,
            precision=self.precision,
            preferred_element_type=wide,
        )
        axes = [self.letters.index(letter) for letter in self.z]
        return dz.transpose(axes).astype(self.dtype)


def _times(x: jax.Array, basis: jax.Array, sizes: jax.Array, how: Any) -> jax.Array:
    return lax.ragged_dot(x, basis.astype(x.dtype), sizes, precision=how)


class Ragged(NamedTuple):
    """A product of runs of rows with an expert each."""

    y: jax.Array
    x: jax.Array
    sizes: jax.Array  # rows of each expert
    precision: Any

    def listen(self, addend: Addend) -> jax.Array:
        expert, summed, free = list(addend.axes)
        x, outer, z = lax.stop_gradient(self.x), [], addend.variable
        for basis in addend.bases:
            projected = addend.projected(basis)
            (rank,) = set(basis.axes) - set(addend.axes)
            array = _ordered(basis, expert + projected + rank)
            if projected == summed:
                x, summed = _times(x, array, self.sizes, self.precision), rank
            else:
                outer.append(array)
                free = rank
        letters = expert + summed + free
        transpose = _PerExpert(letters, z.axes, z.array().dtype, self.precision)
        return listen(transpose, self.y, (x, self.sizes, tuple(outer)), z.array())

    def flops(self, addend: Addend) -> tuple[int, int]:
        rows, before, after = len(self.x), self.x.shape[1], self.y.shape[1]
        dense, low, summed = 2 * rows * before * after, 0, addend.axes[1]
        for basis in addend.bases:
            rank = basis.shape[-1]
            if addend.projected(basis) == summed:
                low, before = low + 2 * rows * before * rank, rank
            else:
                low, after = low + 2 * rows * after * rank, rank
        return dense, low + 2 * rows * before * after


def _ordered(basis: Term, axes: str) -> jax.Array:
    return basis.array().transpose([basis.axes.index(letter) for letter in axes])


def _ragged_dot(run: Run, equation: Any, operands: list[Any]) -> list[Any] | None:
    x, weight, *others = operands
    if not isinstance(weight, Factored) or isinstance(x, Factored):
        return None
    if not _is_plain(equation.params) or not _is_per_expert(weight.addend):
        return None
    (y,) = run.bind(equation, [x, weight.weight, *others])
    product = Ragged(y, x, others[0], equation.params["precision"])
    return [run.product(weight.addend, product)]


def _is_per_expert(addend: Addend) -> bool:
    """Whether each expert has a basis of its own for one axis, or for both."""
    expert = addend.axes[0]
    return expert in addend.variable.axes and all(
        expert in basis.axes and len(addend.projected(basis)) == 1
        for basis in addend.bases
    )


def _is_plain(params: Any) -> bool:
    """Whether this is `lax.ragged_dot`, with no axes exchanged."""
    dims = params["ragged_dot_dimension_numbers"]
    found = (
        tuple(map(tuple, dims.dot_dimension_numbers[0])),
        tuple(map(tuple, dims.dot_dimension_numbers[1])),
        tuple(dims.lhs_ragged_dimensions),
        tuple(dims.rhs_group_dimensions),
    )
    return found == (((1,), (1,)), ((), ()), (0,), (0,))


RULES: dict[str, Rule] = {"ragged_dot_general": _ragged_dot}
