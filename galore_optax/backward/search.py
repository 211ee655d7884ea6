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

from galore_optax._projector.groups import Group, each, parts, split
from galore_optax._projector.project import accumulation_dtype
from galore_optax._projector.refresh import any_lane
from galore_optax._projector.renew import (
    Found,
    Run,
    Turn,
    aligned,
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
    share: int  # those of one share are made together, one share after another

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
        return [self._each(one, given, columns) for given, columns in pairs]

    def after(
        self, number: jax.Array, products: list[jax.Array], found: Columns
    ) -> Columns:
        """Of products `G Y`, what the next turn starts from, or the last of all."""

        def one(given: Any, old: Columns) -> Columns:
            columns, left = given

            def another(old: Columns) -> Columns:
                rows, usable = self._unit(columns)
                rows = _if(left > number + 1, self.method.between, rows)
                return Columns(self._kept(rows), old.usable & usable)

            return _if(left > number, another, old)

        return self._each(one, (jnp.concatenate(products), self._passes), found)

    def finish(self, found: tuple[Columns, ...]) -> Found:
        """New projectors by leaf, and which matrices took one."""

        def one(given: Any, old: Any) -> tuple[Projectors, jax.Array]:
            columns, name = given
            return _if(old[1], lambda old: self._renew(columns, name, old[0]), old)

        usable = functools.reduce(jnp.logical_and, [x.usable for x in found])
        given = [x.columns for x in found], jnp.asarray(self.turn.names)
        stacks, accepted = self._each(one, given, (self._stacks, usable))
        return split(self.group.leaves, stacks, self.run.step), accepted

    def _each(self, one: Callable[[Any, Tree], Tree], given: Any, stacks: Tree) -> Tree:
        """`_in_place`: one matrix a turn on CPU, several elsewhere, as in `renew`."""
        count = len(jax.tree.leaves(stacks)[0])
        several = max(x for x in range(1, self.group.at_once + 1) if count % x == 0)
        run = functools.partial(_in_place, one)
        if several == 1:
            return run(1, given, stacks)
        return lax.platform_dependent(
            given,
            stacks,
            cpu=functools.partial(run, 1),
            default=functools.partial(run, several),
        )

    def _renew(
        self, columns: list[jax.Array], name: jax.Array, old: Projectors
    ) -> tuple[Projectors, jax.Array]:
        matrix, bases = self.group.leaves[0].matrix, []
        for side, x in enumerate(columns):
            key = key_of_side(self.run.key_of(name), side)
            basis = self.method.finish(x.T.astype(self._wide), matrix.rank, key)
            check_shape(self.method, basis, self._shape(side), matrix.rank)
            if self.run.align_signs:
                basis = aligned(basis, self._decode(old[side], side))
            bases.append(basis)
        new, sound = store(self.method, matrix.storage, bases, old)
        return _choose(sound, new, old), sound

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


def _if(holds: jax.Array, change: Callable[[Tree], Tree], x: Tree) -> Tree:
    """`change(x)` where it holds; where it does in no lane, nothing is computed."""

    def some(x: Tree) -> Tree:
        return _choose(holds, change(x), x)

    return lax.cond(any_lane(holds), some, lambda x: x, x)


def _choose(holds: jax.Array, new: Tree, old: Tree) -> Tree:
    return jax.tree.map(lambda x, y: jnp.where(holds, x, y), new, old)


def _in_place(
    one: Callable[[Any, Tree], Tree], size: int, given: Any, stacks: Tree
) -> Tree:
    """`one(given, stack)` in place of the entries of `stacks`, `size` a turn."""

    def turn(number: jax.Array, stacks: Tree) -> Tree:
        first = number * size

        def now(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, first, size)

        def put(stack: jax.Array, new: jax.Array) -> jax.Array:
            changed = lax.dynamic_update_slice_in_dim(stack, row_major(new), first, 0)
            return row_major(changed)

        mine, old = jax.tree.map(now, (given, stacks))
        return jax.tree.map(put, stacks, each(one, size)(mine, old))

    count = len(jax.tree.leaves(stacks)[0])
    return lax.fori_loop(0, count // size, turn, stacks)
