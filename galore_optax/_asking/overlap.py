# SPDX-License-Identifier: Apache-2.0
"""How far a basis has turned between two states."""

from typing import Any

import jax
import optax

from galore_optax._asking.record import galore_states, plans_of
from galore_optax._projector.project import overlap
from galore_optax._selection.leaves import unboxed
from galore_optax._state import read


def basis_overlap(
    tx: optax.GradientTransformation, state: Any, earlier: Any, params: Any
) -> dict[str, jax.Array]:
    r"""How much of each subspace of an earlier state the later one still holds.

    .. math:: \|P^T P_{earlier}\|_F^2 / r

    Between 0 and 1 for orthonormal bases: 1 for the same subspace, whatever its signs
    and the order of its columns, and about r / m for random ones of m dimensions. Where
    it stays near 1 from refresh to refresh a larger `update_proj_gap` loses little, or
    `refresh.lazy()` finds that out by itself; near r / m the bases are those of single
    batches. With two projectors a matrix, the smaller one of both.

    Nothing is stored for it: the caller keeps the earlier state, or a copy of what it
    holds where steps donate theirs. Works under `jit`.

    Args:
      tx: a transformation that contains `galore`, however wrapped.
      state: of `tx`.
      earlier: another state of it, as of a refresh before.
      params: the tree that both were made for; shapes will do.

    Returns:
      by path of each projected leaf, f32 of its batch shape.

    Raises:
      ValueError: `tx` contains no `galore`, or a state belongs to another tree.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> tx = galore_optax.galore(optax.adam(1e-3), rank=2)
      >>> grads = {"w": jnp.diag(jnp.array([1.0, 1.5, 2.0, 3.0]))}
      >>> before = tx.init(grads)  # a slice of the identity: the two smallest
      >>> _, after = tx.update(grads, before)
      >>> bool(galore_optax.basis_overlap(tx, after, before, grads)["w"] < 0.1)
      True

    Source: after Q-GaLore, arXiv 2407.08296, section 3.2.
    """
    records, _ = plans_of(tx, params)
    pairs = (galore_states(records, unboxed(x)) for x in (state, earlier))
    found = {}
    for record, late, early in zip(records, *pairs, strict=True):
        bases = (read(record.plan, x) for x in (late, early))
        for matrix, new, old in zip(record.plan.projected, *bases, strict=True):
            found[matrix.path] = overlap(matrix, new, old)
    return found
