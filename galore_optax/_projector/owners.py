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
from galore_optax._projector.groups import leaves_of
from galore_optax._projector.renew import Found, Run, Turn, renew_leaves
from galore_optax._selection.matrices import Plan
from galore_optax._storage.projectors import Projectors
from galore_optax._xla.sharding import place, sharding_of


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

    def bundles(self, gradients: Sequence[jax.Array]) -> list[list[int]]:
        """Positions of leaves that are dealt out together.

        One that gives all devices as many matrices is by itself: it needs no copy.
        """
        found: dict[Any, list[int]] = {}
        members = zip(self.members, gradients, strict=True)
        for position, (member, gradient) in enumerate(members):
            even = member.deal.count % math.prod(member.deal.sizes) == 0
            key = (member.kind(gradient.dtype), position if even else None)
            found.setdefault(key, []).append(position)
        return list(found.values())

    def renew(
        self, gradients: Sequence[jax.Array], turn: Turn, run: Run, *, together: bool
    ) -> Found:
        """As `renew_leaves`."""
        places = [member.places for member in self.members]
        specs, all_of_it = jax.tree.map(lambda x: x.spec, places), PartitionSpec()
        bundles = self.bundles(gradients)
        work = functools.partial(_work, self, bundles, run, together)
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
    positions: list[list[int]],
    run: Run,
    together: bool,
    pieces: list[Pieces],
    shared: tuple[Turn, jax.Array, jax.Array],
) -> tuple[list[Projectors], jax.Array]:
    """Of one device: new projectors as far as they lie here, and what was accepted."""
    turn, key, step = shared
    bundles = [Bundle(tuple(owners.members[i] for i in at)) for at in positions]
    hands = [
        bundle.dealt([pieces[i] for i in at])
        for bundle, at in zip(bundles, positions, strict=True)
    ]
    leaves = leaves_of(
        [bundle.matrix for bundle in bundles],
        [hand.gradient for hand in hands],
        [hand.projectors for hand in hands],
    )
    mine = jnp.concatenate([hand.numbers for hand in hands])
    own, run = _own(turn, mine), run._replace(key=key, step=step)
    new, accepted = renew_leaves(leaves, own, run, together=together)
    found: dict[int, Projectors] = {}
    for bundle, at, projectors in zip(bundles, positions, new, strict=True):
        found.update(zip(at, bundle.collected(projectors), strict=True))
    taken = _of_all(accepted, mine, len(turn.owed), owners.mesh.axis_names)
    return [found[position] for position in sorted(found)], taken


def _own(turn: Turn, mine: jax.Array) -> Turn:
    lanes, owed, cold, names = (x[mine] for x in turn)
    somebody = mine != NOBODY
    return Turn(lanes & somebody, owed & somebody, cold, names)


def _of_all(
    accepted: jax.Array, mine: jax.Array, count: int, axes: tuple[str, ...]
) -> jax.Array:
    """(count,): whether a matrix took a basis, wherever its owner is."""
    number = jnp.where(mine == NOBODY, count, mine)
    taken = jnp.zeros(count, jnp.int32)
    taken = taken.at[number].set(accepted.astype(jnp.int32), mode="drop")
    return jax.lax.psum(taken, axes) > 0
