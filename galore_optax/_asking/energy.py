# SPDX-License-Identifier: Apache-2.0
"""How much of a gradient its projector captures."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax._asking.record import galore_states, plans_of
from galore_optax._projector.project import accumulation_dtype, project
from galore_optax._selection.leaves import flatten, unboxed
from galore_optax._selection.matrices import Matrix
from galore_optax._state import read
from galore_optax._storage.projectors import Projectors


def captured_energy(
    tx: optax.GradientTransformation, state: Any, gradients: Any
) -> dict[str, jax.Array]:
    r"""The share of each gradient's squared norm inside its subspace.

    .. math:: \|P^T G\|_F^2 / \|G\|_F^2

    Between 0 and 1 for an orthonormal projector, up to its rounding where it is stored
    in few bits; the best possible value is the share of the `rank` largest squared
    singular values. Works under `jit`.

    Args:
      tx: a transformation that contains `galore`, however wrapped.
      state: of `tx`.
      gradients: full size, like params.

    Returns:
      by path of each projected leaf, f32 (f64 for f64 gradients) of its batch shape;
      NaN where a gradient is zero.

    Raises:
      ValueError: `tx` contains no `galore`, or `state` belongs to another tree.

    Example:
      >>> import galore_optax, jax, jax.numpy as jnp, optax
      >>> tx = galore_optax.galore(optax.adam(1e-3), rank=2)
      >>> grads = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0, 0.0]))}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> print(f"{galore_optax.captured_energy(tx, state, grads)['w']:.3f}")
      0.929

    Source: Eckart and Young, 1936, for the best possible value.
    """
    records, _ = plans_of(tx, gradients)
    flat = flatten(gradients)
    by_path = dict(zip(flat.paths, flat.values, strict=True))
    energies: dict[str, jax.Array] = {}
    states = galore_states(records, unboxed(state))
    for record, found in zip(records, states, strict=True):
        projectors = read(record.plan, found)
        for matrix, pair in zip(record.plan.projected, projectors, strict=True):
            energies[matrix.path] = _energy(matrix, pair, by_path[matrix.path])
    return energies


def _energy(matrix: Matrix, projectors: Projectors, gradient: jax.Array) -> jax.Array:
    found = squares(matrix, projectors, gradient)
    return found.inside / found.total


class Squares(NamedTuple):
    """Squared norms of a gradient's matrices, arrays of the batch shape."""

    inside: jax.Array  # of the coordinates
    total: jax.Array
    unit: jax.Array  # what both are squares of multiples of
    coordinates: jax.Array  # in this unit


def squares(matrix: Matrix, projectors: Projectors, gradient: jax.Array) -> Squares:
    """In a unit in which the squares of very large and very small ones are in range."""
    gradient = gradient.astype(accumulation_dtype(gradient))
    largest = jnp.max(jnp.abs(gradient))
    unit = jnp.where(largest > 0, largest, 1)
    gradient = gradient / unit
    coordinates = project(matrix, projectors, gradient)
    batch = [chr(ord("a") + axis) for axis in matrix.batch]
    within = [letter not in batch for letter in matrix.coordinate_letters]
    inside = [axis for axis, sums in enumerate(within) if sums]
    others = [axis for axis in range(gradient.ndim) if axis not in matrix.batch]
    sums = jnp.sum(coordinates**2, inside), jnp.sum(gradient**2, others)
    return Squares(*sums, unit, coordinates)
