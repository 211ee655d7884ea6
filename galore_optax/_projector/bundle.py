# SPDX-License-Identifier: Apache-2.0
"""Leaves whose matrices are dealt out over a mesh together.

member      one leaf: where its arrays lie, its batch axes seen as one
bundle      members of one kind, their matrices as one stack
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from galore_optax._placing import rules
from galore_optax._placing.deal import Deal
from galore_optax._placing.declared import spread
from galore_optax._selection.matrices import Matrix
from galore_optax._storage.projectors import Projectors
from galore_optax._xla.sharding import Names, made_of, names_of, shards

NOBODY = -1  # the number of what fills up the hand of a device


class Pieces(NamedTuple):
    """What a device has of a leaf or, dealt out, of a bundle."""

    gradient: Any  # batch axes first
    projectors: Any
    numbers: Any  # int32: of its matrices


@dataclasses.dataclass(frozen=True)
class Split:
    """The mesh axes of each array axis but batch axes; a leaf of a tree."""

    names: tuple[Names, ...]


@dataclasses.dataclass(frozen=True)
class Member:
    """One leaf."""

    matrix: Matrix
    lying: NamedSharding
    projectors: Projectors

    @property
    def mesh(self) -> Any:
        return self.lying.mesh

    @property
    def names(self) -> list[Names]:
        """The mesh axes of each axis of the leaf."""
        return names_of(self.lying, len(self.matrix.shape))

    @property
    def batch(self) -> list[Names]:
        return [self.names[axis] for axis in self.matrix.batch]

    @property
    def rest(self) -> list[int]:
        """Axes of the leaf that are no batch axes."""
        batch = self.matrix.batch
        return [axis for axis in range(len(self.matrix.shape)) if axis not in batch]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Of what a device has."""
        sizes = zip(self.matrix.batch_shape, self.batch, strict=True)
        return tuple(size // shards(self.mesh, names) for size, names in sizes)

    @property
    def deal(self) -> Deal:
        """Over the mesh axes that do not split batch axes."""
        taken = {name for names in self.batch for name in names}
        axes = tuple(name for name in self.mesh.axis_names if name not in taken)
        sizes = tuple(self.mesh.shape[name] for name in axes)
        return Deal(axes, sizes, math.prod(self.batch_shape))

    @property
    def split(self) -> Pieces:
        """A `Split` for each array."""
        gradient = Split(tuple(self.names[axis] for axis in self.rest))
        pairs = zip(self.matrix.sides, self.projectors, strict=True)
        lying = [
            (rules.stored(self.matrix, side, self.lying, spread()), arrays)
            for side, arrays in pairs
        ]
        return Pieces(gradient, tuple(self._split(*x) for x in lying), Split(()))

    def _split(self, places: Any, arrays: Any) -> Any:
        batch = len(self.matrix.batch)

        def one(place: NamedSharding, x: jax.Array) -> Split:
            return Split(tuple(names_of(place, x.ndim)[batch:]))

        return jax.tree.map(one, places, arrays)

    @property
    def places(self) -> Pieces:
        """Of all its arrays, batch axes as those of the leaf."""
        found: Pieces = jax.tree.map(
            lambda split: made_of(self.mesh, [*self.batch, *split.names]), self.split
        )
        return found

    def pieces(self, gradient: jax.Array, first: int) -> Pieces:
        """Its arrays; its matrices are numbered from `first` on."""
        index = first + np.arange(self.matrix.count, dtype=np.int32)
        numbers = jnp.asarray(index.reshape(self.matrix.batch_shape))
        turned = gradient.transpose(*self.matrix.batch, *self.rest)
        return Pieces(turned, self.projectors, numbers)

    def stacked(self, x: jax.Array) -> jax.Array:
        """A local array, its batch axes as one."""
        return x.reshape(-1, *x.shape[len(self.batch_shape) :])

    def stack_of(self, count: int) -> Matrix:
        """The leaf as one of so many matrices, with one batch axis."""
        matrix, new = self.matrix, {axis: 1 + i for i, axis in enumerate(self.rest)}

        def moved(axes: Sequence[int]) -> tuple[int, ...]:
            return tuple(new[axis] for axis in axes)

        sides = tuple(
            dataclasses.replace(side, axes=moved(side.axes), others=moved(side.others))
            for side in matrix.sides
        )
        return dataclasses.replace(
            matrix,
            shape=(count, *(matrix.shape[axis] for axis in self.rest)),
            rows=moved(matrix.rows),
            cols=moved(matrix.cols),
            batch=(0,),
            sides=sides,
        )

    def kind(self, dtype: jnp.dtype) -> tuple[Any, ...]:
        """Leaves of one kind, gradients of one dtype, have one stack."""
        one = self.stack_of(1)
        sides = tuple((side.axes, side.others) for side in one.sides)
        dtypes = (dtype, *(x.dtype for x in jax.tree.leaves(self.projectors)))
        splits = tuple(jax.tree.leaves(self.split))
        return one.shape, sides, one.rank, one.storage, dtypes, splits, self.deal.axes


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Leaves of one kind; local arrays throughout."""

    members: tuple[Member, ...]

    @property
    def deal(self) -> Deal:
        total = sum(member.deal.count for member in self.members)
        return dataclasses.replace(self.members[0].deal, count=total)

    @property
    def matrix(self) -> Matrix:
        """The leaf that an owner sees."""
        return self.members[0].stack_of(self.deal.each)

    def dealt(self, pieces: Sequence[Pieces]) -> Pieces:
        """What is to be renewed here."""
        return self._dealt(self.deal, self._joined(pieces))

    def filled(self, pieces: Sequence[Pieces]) -> Pieces:
        """What lies here of a hand for every device."""
        gradient, projectors, numbers = self._joined(pieces)
        fill = self.deal.filled
        return Pieces(
            fill(gradient), jax.tree.map(fill, projectors), fill(numbers, NOBODY)
        )

    def hand(self, filled: Pieces, number: jax.Array) -> Pieces:
        """The one with a number of what is to be renewed here."""
        nth = jax.tree.map(lambda x: self.deal.nth(x, number), filled)
        return self._dealt(self.deal.one_each, nth)

    def back(self, found: Projectors) -> Projectors:
        """The inverse of `hand`, of projectors: what lies here of one from each."""
        first = self.members[0]
        batch = len(first.matrix.batch)

        def whole(new: jax.Array, old: jax.Array) -> jax.Array:
            return new.reshape(1, *old.shape[batch:])

        return self._each(
            self.deal.one_each.collect, jax.tree.map(whole, found, first.projectors)
        )

    def apart(self, found: Projectors, pieces: Sequence[Pieces]) -> list[Projectors]:
        """Of each member what lies here, in the shapes that `pieces` have it in."""
        start, parts = 0, []
        for member, piece in zip(self.members, pieces, strict=True):
            end = start + member.deal.count

            def part(
                new: jax.Array, old: jax.Array, a: int = start, b: int = end
            ) -> Any:
                return new[a:b].reshape(old.shape)

            parts.append(jax.tree.map(part, found, piece.projectors))
            start = end
        return parts

    def collected(
        self, found: Projectors, pieces: Sequence[Pieces]
    ) -> list[Projectors]:
        """The inverse of `dealt`, of projectors: of each member what lies here."""
        return self.apart(self._each(self.deal.collect, found), pieces)

    def _joined(self, pieces: Sequence[Pieces]) -> Pieces:
        stacks = [
            jax.tree.map(member.stacked, each)
            for member, each in zip(self.members, pieces, strict=True)
        ]
        joined: Pieces = jax.tree.map(lambda *x: jnp.concatenate(x), *stacks)
        return joined

    def _dealt(self, deal: Deal, joined: Pieces) -> Pieces:
        gradient, projectors, numbers = joined
        names = self.members[0].split.gradient.names
        return Pieces(
            deal.deal(gradient, names),
            self._each(deal.deal, projectors),
            deal.deal(numbers, (), NOBODY),
        )

    def _each(self, move: Callable[..., Any], arrays: Any) -> Any:
        splits = self.members[0].split.projectors
        return jax.tree.map(lambda split, x: move(x, split.names), splits, arrays)
