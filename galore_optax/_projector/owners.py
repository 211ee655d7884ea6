# SPDX-License-Identifier: Apache-2.0
"""A refresh on a mesh: each matrix is renewed by one device, and by no other.

    deal        what devices have of a matrix goes to its owner, gradient and projector
    renew       each owner its own matrices, as a single device does: the same bits
    collect     new projectors go to where they live

Matrices are dealt out over all mesh axes but those that split their batch axes, along
which they are dealt out already. The loop of an owner sends nothing, and is as long as
what is due of its own.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from galore_optax._projector.bundle import NOBODY, Bundle, Member, Pieces
from galore_optax._projector.groups import Leaf, kind_of, leaves_of
from galore_optax._projector.renew import Found, Run, Turn, renew_leaves
from galore_optax._selection.matrices import Plan
from galore_optax._storage.projectors import Projectors
from galore_optax._xla.order import once_done
from galore_optax._xla.sharding import place, sharding_of

# Bytes of a gradient up to which several matrices of one device share a turn: of larger
# ones a turn is long, and the workspace of each is a share of what a device holds.
_SMALL = 2**22


def owners_of(
    plan: Plan, gradients: Sequence[jax.Array], projectors: Sequence[Projectors]
) -> "Owners | None":
    """Who renews the matrices of a tree; `None` where it is not known to be split."""
    members = []
    leaves = zip(plan.projected, gradients, projectors, strict=True)
    for matrix, gradient, arrays in leaves:
        lying = sharding_of(matrix.path, gradient)
        if lying is None or len(set(lying.mesh.axis_types)) > 1:
            return None
        members.append(Member(matrix, lying, arrays))
    return Owners(tuple(members)) if members[0].mesh.size > 1 else None


def _bytes(member: Member, gradient: jax.Array) -> int:
    """Of one matrix of a leaf."""
    return gradient.size // member.matrix.count * gradient.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Owners:
    """Of all matrices of a tree."""

    members: tuple[Member, ...]

    @property
    def mesh(self) -> Any:
        return self.members[0].mesh

    @property
    def spare_gathers(self) -> bool:
        """Whether without owners a stack would be gathered for each of its matrices."""
        explicit = AxisType.Explicit in self.mesh.axis_types
        return explicit or any(any(member.batch) for member in self.members)

    def kinds(self, gradients: Sequence[jax.Array]) -> list[list[list[int]]]:
        """Positions of leaves, by what shares a loop, by what is dealt out together.

        A leaf that gives all devices as many matrices is by itself: it needs no copy.
        """
        found: dict[Any, dict[Any, list[int]]] = {}
        members = zip(self.members, gradients, strict=True)
        for position, (member, gradient) in enumerate(members):
            even = member.deal.count % math.prod(member.deal.sizes) == 0
            stack = (member.kind(gradient.dtype), position if even else None)
            loop = kind_of(member.matrix, gradient, member.projectors)
            found.setdefault(loop, {}).setdefault(stack, []).append(position)
        return [list(stacks.values()) for stacks in found.values()]

    def renew(
        self, gradients: Sequence[jax.Array], turn: Turn, run: Run, *, together: bool
    ) -> Found:
        """As `renew_leaves`."""
        places = [member.places for member in self.members]
        specs, all_of_it = jax.tree.map(lambda x: x.spec, places), PartitionSpec()
        small = all(
            _bytes(*x) <= _SMALL for x in zip(self.members, gradients, strict=True)
        )
        kinds = self.kinds(gradients)
        work = functools.partial(_work, self, kinds, run, together and small)
        mapped = jax.shard_map(
            work,
            mesh=self.mesh,
            in_specs=(specs, all_of_it),
            out_specs=([x.projectors for x in specs], all_of_it),
            check_vma=False,
        )
        shared = jax.tree.map(jnp.asarray, (turn, run.key, run.step))
        found, accepted = mapped(
            jax.tree.map(place, self._pieces(gradients), places), shared
        )
        return found, accepted

    def _pieces(self, gradients: Sequence[jax.Array]) -> list[Pieces]:
        firsts = np.cumsum([0, *(member.matrix.count for member in self.members)])
        leaves = zip(self.members, gradients, firsts, strict=False)
        return [member.pieces(x, int(first)) for member, x, first in leaves]


def _work(
    owners: Owners,
    kinds: list[list[list[int]]],
    run: Run,
    together: bool,
    pieces: list[Pieces],
    shared: tuple[Turn, jax.Array, jax.Array],
) -> tuple[list[Projectors], jax.Array]:
    """Of one device: new projectors as far as they lie here, and what was accepted."""
    turn, key, step = shared
    run = run._replace(key=key, step=step)
    found: dict[int, Projectors] = {}
    taken = jnp.zeros(len(turn.owed), jnp.int32)
    for positions in kinds:
        # Or gradients of all kinds would be dealt out at once, and all be held.
        now = once_done({i: pieces[i] for at in positions for i in at}, taken)
        hands = [_Hand(owners, at, [now[i] for i in at]) for at in positions]
        mine = jnp.concatenate([hand.pieces.numbers for hand in hands])
        new, accepted = renew_leaves(
            _leaves(hands), _own(turn, mine), run, together=together
        )
        for hand, projectors in zip(hands, new, strict=True):
            found.update(hand.collected(projectors))
        number = jnp.where(mine == NOBODY, len(turn.owed), mine)
        taken = taken.at[number].set(accepted.astype(jnp.int32), mode="drop")
    everyones = jax.lax.psum(taken, owners.mesh.axis_names) > 0
    return [found[position] for position in sorted(found)], everyones


class _Hand:
    """What one device renews of one bundle."""

    def __init__(self, owners: Owners, positions: list[int], pieces: list[Pieces]):
        self.positions = positions
        self.bundle = Bundle(tuple(owners.members[i] for i in positions))
        self.pieces = self.bundle.dealt(pieces)

    def collected(self, found: Projectors) -> dict[int, Projectors]:
        """By position, what lies here."""
        parts = self.bundle.collected(found)
        return dict(zip(self.positions, parts, strict=True))


def _leaves(hands: Sequence[_Hand]) -> list[Leaf]:
    return leaves_of(
        [hand.bundle.matrix for hand in hands],
        [hand.pieces.gradient for hand in hands],
        [hand.pieces.projectors for hand in hands],
    )


def _own(turn: Turn, mine: jax.Array) -> Turn:
    lanes, owed, cold, names = (x[mine] for x in turn)
    somebody = mine != NOBODY
    return Turn(lanes & somebody, owed & somebody, cold, names)
