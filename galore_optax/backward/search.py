# SPDX-License-Identifier: Apache-2.0
"""The search for bases by products, for the matrices of one kind.

The steps of `ByProducts`, matrix by matrix, between passes of the loss that make the
products of all. A matrix that is not due, or is done, keeps what it has. Vectors are
kept in the dtype of the leaf, in which gradients would be too, and worked on in f32 at
least. In between they lie as projectors do: a row of the method is a column.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from galore_optax._projector.groups import Group, at, parts, split
from galore_optax._projector.project import accumulation_dtype
from galore_optax._projector.refresh import any_lane
from galore_optax._projector.renew import (
    Found,
    Run,
    Turn,
    check_shape,
    key_of_side,
    store,
)
from galore_optax._storage.projectors import Projectors
from galore_optax._xla.order import row_major
from galore_optax.backward.passes import Factor
from galore_optax.subspace._base import ByProducts

Tree = TypeVar("Tree")


class Columns(NamedTuple):
    """What is searched with on one side."""

    columns: jax.Array  # (matrices, m, width)
    usable: jax.Array  # (matrices,): owed, and no product was zero or not finite


@dataclasses.dataclass(frozen=True)
class Search:
    """The matrices of one kind, and what their refresh is made from."""

    group: Group
    places: tuple[int, ...]  # of its leaves among those of params
    turn: Turn
    run: Run
    method: ByProducts

    @property
    def sides(self) -> int:
        return len(self.group.leaves[0].matrix.sides)

    @property
    def needs_gradient(self) -> bool:
        passes = self.method.passes(jnp.bool_(True))
        return not (isinstance(passes, int) and passes == 0)

    @property
    def turns(self) -> jax.Array:
        """Products for the matrix that takes most, in any lane of a `vmap`."""
        _, owed, cold, _ = self.turn
        first, later = (any_lane(jnp.any(owed & x)) for x in (cold, ~cold))
        passes = self.method.passes
        return jnp.maximum(
            jnp.where(first, passes(jnp.bool_(True)), 0),
            jnp.where(later, passes(jnp.bool_(False)), 0),
        )

    def factors(self, side: int, *, opposite: bool) -> list[Factor]:
        found = []
        for leaf, place in zip(self.group.leaves, self.places, strict=True):
            axes = leaf.matrix.sides[side].axes, leaf.matrix.sides[side].others
            found.append(Factor(leaf.matrix, place, *axes[:: -1 if opposite else 1]))
        return found

    def by_leaf(self, columns: jax.Array) -> list[jax.Array]:
        counts = self.group.counts
        shapes = [(count, *columns.shape[1:]) for count in counts]
        return parts(columns, counts, shapes, self.run.step)

    def start(self, side: int) -> Columns:
        shape = self._shape(side)

        def one(given: Any) -> jax.Array:
            stored, name, cold = given
            key = key_of_side(self.run.key_of(name), side)
            old = self._decode(stored, side)
            return self._kept(self.method.start(shape, old, key, cold))

        given = self._stacks[side], jnp.asarray(self.turn.names), self.turn.cold
        return Columns(lax.map(one, given), self.turn.owed)

    def right(self, number: jax.Array, coordinates: list[jax.Array]) -> list[jax.Array]:
        """Of products `GᵀX` of each leaf, what is multiplied by `G`."""

        def one(given: Any, columns: jax.Array) -> jax.Array:
            return lax.cond(given > number, self._right, jnp.zeros_like, columns)

        left = self.by_leaf(self._passes)
        pairs = zip(left, coordinates, strict=True)
        return [_in_place(one, given, columns) for given, columns in pairs]

    def after(
        self, number: jax.Array, products: list[jax.Array], found: Columns
    ) -> Columns:
        """Of products `G Y`, what the next turn starts from, or the last of all."""

        def keep(columns: jax.Array, old: Columns) -> Columns:
            del columns
            return old

        def last(columns: jax.Array, old: Columns) -> Columns:
            rows, usable = self._unit(columns)
            return Columns(self._kept(rows), old.usable & usable)

        def another(columns: jax.Array, old: Columns) -> Columns:
            rows, usable = self._unit(columns)
            return Columns(self._kept(self.method.between(rows)), old.usable & usable)

        def one(given: Any, old: Columns) -> Columns:
            columns, left = given
            which = jnp.clip(left - number, 0, 2)
            return lax.switch(which, [keep, last, another], columns, old)

        return _in_place(one, (jnp.concatenate(products), self._passes), found)

    def finish(self, found: tuple[Columns, ...]) -> Found:
        """New projectors by leaf, and which matrices took one."""

        def keep(columns: Any, name: jax.Array, old: Projectors) -> Any:
            del columns, name
            return old, jnp.bool_(False)

        def one(given: Any, old: Any) -> tuple[Projectors, jax.Array]:
            return lax.cond(old[1], self._renew, keep, *given, old[0])

        usable = functools.reduce(jnp.logical_and, [x.usable for x in found])
        given = [x.columns for x in found], jnp.asarray(self.turn.names)
        stacks, accepted = _in_place(one, given, (self._stacks, usable))
        return split(self.group.leaves, stacks, self.run.step), accepted

    def _renew(
        self, columns: list[jax.Array], name: jax.Array, old: Projectors
    ) -> tuple[Projectors, jax.Array]:
        matrix, bases = self.group.leaves[0].matrix, []
        for side, x in enumerate(columns):
            key = key_of_side(self.run.key_of(name), side)
            basis = self.method.finish(x.T.astype(self._wide), matrix.rank, key)
            check_shape(self.method, basis, self._shape(side), matrix.rank)
            bases.append(basis)
        new, sound = store(self.method, matrix.storage, bases, old)
        return jax.tree.map(lambda x, y: jnp.where(sound, x, y), new, old), sound

    def _right(self, columns: jax.Array) -> jax.Array:
        return self._kept(self.method.right(self._unit(columns)[0]))

    @property
    def _wide(self) -> jnp.dtype:
        return accumulation_dtype(self.group.leaves[0].gradient)

    def _kept(self, rows: jax.Array) -> jax.Array:
        """Columns, of rows."""
        return rows.T.astype(self.group.leaves[0].gradient.dtype)

    def _unit(self, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Rows, divided by the largest entry, and whether it is one to divide by.

        As gradients are before their bases are found: no square leaves the range of
        f32.
        """
        rows = columns.T.astype(self._wide)
        size = jnp.max(jnp.abs(rows))
        usable = jnp.isfinite(size) & (size > 0)
        return jnp.where(usable, rows / size, 0), usable

    @property
    def _passes(self) -> jax.Array:
        """(matrices,): products that each takes."""
        passes = self.method.passes
        first, later = (passes(jnp.bool_(x)) for x in (True, False))
        return jnp.where(self.turn.owed, jnp.where(self.turn.cold, first, later), 0)

    @property
    def _stacks(self) -> Projectors:
        stacks = [leaf.stacks for leaf in self.group.leaves]
        return jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)

    def _shape(self, side: int) -> tuple[int, int]:
        matrix = self.group.leaves[0].matrix
        axes = matrix.sides[side]
        return matrix.size(axes.axes), matrix.size(axes.others)

    def _decode(self, stored: Any, side: int) -> jax.Array:
        leaf = self.group.leaves[0]
        shape = self._shape(side)[0], leaf.matrix.rank
        basis = leaf.matrix.storage.decode(stored, shape, self._wide)
        return basis.astype(self._wide)


def _in_place(one: Callable[[Any, Tree], Tree], given: Any, stacks: Tree) -> Tree:
    """`one(given, stack)` in place of each matrix's entry of `stacks`."""

    def turn(number: jax.Array, stacks: Tree) -> Tree:
        mine, old = jax.tree.map(lambda x: at(x, number), (given, stacks))

        def put(stack: jax.Array, new: jax.Array) -> jax.Array:
            return lax.dynamic_update_index_in_dim(stack, row_major(new), number, 0)

        return jax.tree.map(put, stacks, one(mine, old))

    count = len(jax.tree.leaves(stacks)[0])
    return lax.fori_loop(0, count, turn, stacks)
