# SPDX-License-Identifier: Apache-2.0
"""Large matrices of one kind, renewed in rounds: one on each device, then the next.

    deal        a matrix of one bundle to each device
    renew       each its own
    collect     new projectors go to where they live

Dealt out at once, the gradients of a kind would all be held, 0.7 GB of LLaMA-7B on each
of sixteen devices.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from galore_optax._projector.bundle import NOBODY, Bundle, Pieces, Split
from galore_optax._projector.groups import leaves_of
from galore_optax._projector.renew import Run, Turn, renew_leaves
from galore_optax._selection.matrices import Matrix
from galore_optax._storage.projectors import Projectors
from galore_optax._xla.order import once_done
from galore_optax._xla.sharding import shards


class Renewed(NamedTuple):
    """Of all rounds, on one device."""

    projectors: list[list[Projectors]]  # by bundle and member, as far as they lie here
    numbers: jax.Array  # of the matrices that this device renewed, or `NOBODY`
    accepted: jax.Array  # of the same


@dataclasses.dataclass(frozen=True)
class Rounds:
    """Bundles whose matrices are of one size, and lie in parts of one size."""

    bundles: tuple[Bundle, ...]

    @property
    def table(self) -> list[tuple[int, int]]:
        """For each round the bundle, and which matrix of every device's hand."""
        each = [bundle.deal.each for bundle in self.bundles]
        return [(i, k) for i, count in enumerate(each) for k in range(count)]

    def renew(
        self, pieces: Sequence[Sequence[Pieces]], turn: Turn, run: Run
    ) -> Renewed:
        """All of them, from what is here of their members, by bundle."""
        pairs = zip(self.bundles, pieces, strict=True)
        deal = [functools.partial(_dealt, *pair) for pair in pairs]
        collect = [functools.partial(_collected, bundle) for bundle in self.bundles]

        def one(_: Any, at: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
            bundle, number = at
            hand = lax.switch(bundle, deal, number)
            leaf = leaves_of([self._matrix], [hand.gradient], [hand.projectors])
            mine = own(turn, hand.numbers)
            (new,), accepted = renew_leaves(leaf, mine, run, together=False)
            return None, (lax.switch(bundle, collect, new), hand.numbers, accepted)

        rounds = tuple(np.array(self.table, np.int32).T)
        _, (parts, numbers, accepted) = lax.scan(one, None, rounds)
        found = self._by_bundle(parts, pieces)
        return Renewed(found, numbers.ravel(), accepted.ravel())

    @property
    def _matrix(self) -> Matrix:
        """Any of them as one of its own, its axes merged into two."""
        matrix = self.bundles[0].matrix
        first = matrix.sides[0]
        sides = [
            dataclasses.replace(side, axes=(1 + i,), others=(2 - i,))
            for i, side in enumerate(matrix.sides)
        ]
        shape = (1, matrix.size(first.axes), matrix.size(first.others))
        return dataclasses.replace(
            matrix, shape=shape, rows=(1,), cols=(2,), batch=(0,), sides=tuple(sides)
        )

    def _by_bundle(
        self, parts: Projectors, pieces: Sequence[Sequence[Pieces]]
    ) -> list[list[Projectors]]:
        found, start = [], 0
        for bundle, theirs in zip(self.bundles, pieces, strict=True):
            end = start + bundle.deal.each
            mine = jax.tree.map(lambda x, a=start, b=end: _in_order(x[a:b]), parts)
            found.append(bundle.apart(mine, theirs))
            start = end
        return found


def part_of(bundle: Bundle) -> Any:
    """What bundles that share rounds have in common, besides the size of a matrix."""
    first = bundle.members[0]
    batch = len(first.matrix.batch)

    def part(split: Split, x: jax.Array) -> int:
        axes = [name for names in split.names for name in names]
        return math.prod(x.shape[batch:]) // shards(first.mesh, tuple(axes))

    parts = jax.tree.map(part, first.split.projectors, first.projectors)
    return bundle.deal.sizes, tuple(jax.tree.leaves(parts))


def own(turn: Turn, mine: jax.Array) -> Turn:
    """Of the matrices with these numbers, some of which may be `NOBODY`'s."""
    lanes, owed, cold, names = (x[mine] for x in turn)
    somebody = mine != NOBODY
    return Turn(lanes & somebody, owed & somebody, cold, names)


def _dealt(bundle: Bundle, pieces: Sequence[Pieces], number: jax.Array) -> Pieces:
    """The matrix of this device, (1, projected, other), and its projectors."""
    # Leaves are joined anew in each round, or the copies of all would be held.
    hand = bundle.hand(bundle.filled(once_done(pieces, number)), number)
    matrix, side = bundle.matrix, bundle.matrix.sides[0]
    turned = hand.gradient.transpose(0, *side.axes, *side.others)
    gradient = turned.reshape(1, matrix.size(side.axes), -1)
    flat = jax.tree.map(lambda x: x.reshape(1, -1, x.shape[-1]), hand.projectors)
    return Pieces(gradient, flat, hand.numbers)


def _collected(bundle: Bundle, new: Projectors) -> Projectors:
    """What lies here of one new projector from every device: (devices, part, rank)."""
    back = bundle.back(new)
    return jax.tree.map(lambda x: x.reshape(len(x), -1, x.shape[-1]), back)


def _in_order(x: jax.Array) -> jax.Array:
    """(rounds, devices, ...) -> matrices, of which each device had neighbours."""
    return jnp.moveaxis(x, 0, 1).reshape(math.prod(x.shape[:2]), *x.shape[2:])
