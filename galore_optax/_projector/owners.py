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
from galore_optax._projector.groups import kind_of, leaves_of
from galore_optax._projector.renew import Found, Run, Turn, renew_leaves
from galore_optax._projector.rounds import Renewed, Rounds, own, part_of
from galore_optax._selection.matrices import Plan
from galore_optax._storage.projectors import Projectors
from galore_optax._xla.order import once_done
from galore_optax._xla.sharding import place, sharding_of

# Bytes of a gradient up to which several matrices of one device share a turn: of larger
# ones a turn is long, and the workspace of each is a share of what a device holds.
_SMALL = 2**22
# Of gradients of one kind that a device is dealt at once; more come in rounds.
HELD_BYTES = 2**26


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

    def kinds(self, gradients: Sequence[jax.Array]) -> list["_Kind"]:
        """What shares a loop.

        A leaf that gives all devices as many matrices is by itself: it needs no copy.
        """
        found: dict[Any, dict[Any, list[int]]] = {}
        members = zip(self.members, gradients, strict=True)
        for position, (member, gradient) in enumerate(members):
            even = member.deal.count % math.prod(member.deal.sizes) == 0
            stack = (member.kind(gradient.dtype), position if even else None)
            loop = kind_of(member.matrix, gradient, member.projectors)
            found.setdefault(loop, {}).setdefault(stack, []).append(position)
        kinds = [self._kind(list(stacks.values())) for stacks in found.values()]
        return [part for kind in kinds for part in self._parts(kind, gradients)]

    def _kind(self, stacks: list[list[int]]) -> "_Kind":
        bundles = [Bundle(tuple(self.members[i] for i in at)) for at in stacks]
        return _Kind(stacks, tuple(bundles))

    def _parts(self, kind: "_Kind", gradients: Sequence[jax.Array]) -> list["_Kind"]:
        """The kind, or as much of it at a time as can be renewed in rounds."""
        first = kind.positions[0][0]
        matrix = _bytes(self.members[first], gradients[first])
        if sum(x.deal.each for x in kind.bundles) * matrix <= HELD_BYTES:
            return [kind]
        alike: dict[Any, list[list[int]]] = {}
        for at, bundle in zip(kind.positions, kind.bundles, strict=True):
            alike.setdefault(part_of(bundle), []).append(at)
        parts = (self._kind(stacks) for stacks in alike.values())
        return [dataclasses.replace(part, in_rounds=True) for part in parts]

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


@dataclasses.dataclass(frozen=True)
class _Kind:
    """Leaves whose matrices share a loop."""

    positions: list[list[int]]  # of the leaves of each bundle
    bundles: tuple[Bundle, ...]
    in_rounds: bool = False

    def renew(
        self, pieces: list[list[Pieces]], turn: Turn, run: Run, *, together: bool
    ) -> Renewed:
        """As far as this device is the owner, from what is here of each leaf."""
        if self.in_rounds:
            return Rounds(self.bundles).renew(pieces, turn, run)
        pairs = list(zip(self.bundles, pieces, strict=True))
        hands = [bundle.dealt(theirs) for bundle, theirs in pairs]
        mine = jnp.concatenate([hand.numbers for hand in hands])
        leaves = leaves_of(
            [bundle.matrix for bundle in self.bundles],
            [hand.gradient for hand in hands],
            [hand.projectors for hand in hands],
        )
        new, accepted = renew_leaves(leaves, own(turn, mine), run, together=together)
        parts = [
            bundle.collected(projectors, theirs)
            for (bundle, theirs), projectors in zip(pairs, new, strict=True)
        ]
        return Renewed(parts, mine, accepted)


def _work(
    owners: Owners,
    kinds: list[_Kind],
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
    for kind in kinds:
        # Or gradients of all kinds would be dealt out at once, and all be held.
        now = once_done({i: pieces[i] for at in kind.positions for i in at}, taken)
        mine = [[now[i] for i in at] for at in kind.positions]
        renewed = kind.renew(mine, turn, run, together=together)
        for at, projectors in zip(kind.positions, renewed.projectors, strict=True):
            found.update(zip(at, projectors, strict=True))
        number = jnp.where(renewed.numbers == NOBODY, len(turn.owed), renewed.numbers)
        accepted = renewed.accepted.astype(jnp.int32)
        taken = taken.at[number].set(accepted, mode="drop")
    everyones = jax.lax.psum(taken, owners.mesh.axis_names) > 0
    return [found[position] for position in sorted(found)], everyones
