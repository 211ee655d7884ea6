# SPDX-License-Identifier: Apache-2.0
"""Rows of a table, as of an embedding: a product with ones and zeros."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax

from galore_optax.backward.addend import Addend, Change, Factored
from galore_optax.backward.listen import dense
from galore_optax.backward.rules import Rule, Run


class Lookup(NamedTuple):
    """Rows of a table; an addend is cut to them."""

    rows: jax.Array

    def listen(self, addend: Addend) -> jax.Array:
        return dense(Factored(self.rows, addend))

    def flops(self, addend: Addend) -> tuple[int, int]:
        """Of the products with bases: adding rows up takes none."""
        low = sum(
            2 * self.rows.size * basis.shape[-1]
            for basis in addend.bases
            if addend.projected(basis)
        )
        return 0, low


def _gather(run: Run, equation: Any, operands: list[Any]) -> list[Any] | None:
    table, indices = operands
    if not isinstance(table, Factored) or not _takes_rows(equation):
        return None
    (axis,) = equation.params["dimension_numbers"].collapsed_slice_dims
    places = equation.params["dimension_numbers"].offset_dims
    (rows,) = run.bind(equation, [table.weight, indices])
    addend = table.addend
    letter, into = addend.axes[axis], addend.fresh(indices.ndim - 1)
    others, taken = iter(addend.axes.replace(letter, "")), iter(into)
    axes = [next(others) if a in places else next(taken) for a in range(rows.ndim)]
    addend = addend.along(letter, _take(equation, indices), into)
    addend = dataclasses.replace(addend, axes="".join(axes))
    return [run.product(addend, Lookup(rows))]


def _takes_rows(equation: Any) -> bool:
    """Whether whole rows are taken along one axis."""
    dims, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    if len(dims.collapsed_slice_dims) != 1 or dims.operand_batching_dims:
        return False
    (axis,) = dims.collapsed_slice_dims
    shape = equation.invars[0].aval.shape
    whole = (*shape[:axis], 1, *shape[axis + 1 :])
    return dims.start_index_map == (axis,) and tuple(sizes) == whole


def _take(equation: Any, indices: jax.Array) -> Change:
    """The same rows of any array; zeros for those that are not there."""
    count = indices.ndim - 1

    def change(x: jax.Array, axis: int) -> jax.Array:
        after = range(axis + count, x.ndim + count - 1)
        dims = lax.GatherDimensionNumbers(
            offset_dims=(*range(axis), *after),
            collapsed_slice_dims=(axis,),
            start_index_map=(axis,),
        )
        sizes = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
        mode = equation.params["mode"]
        return lax.gather(x, indices, dims, sizes, mode=mode, fill_value=0)

    return change


RULES: dict[str, Rule] = {"gather": _gather}
