# SPDX-License-Identifier: Apache-2.0
"""What a run is watched by: numbers by path, for a logger."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax._asking.effective_rank import effective_rank
from galore_optax._asking.energy import squares
from galore_optax._asking.record import galore_states, plans_of
from galore_optax._projector.project import accumulation_dtype
from galore_optax._selection.leaves import flatten, unboxed
from galore_optax._state import GaLoreState, read


def metrics(
    tx: optax.GradientTransformation, state: Any, gradients: Any
) -> dict[str, jax.Array]:
    r"""Scalars that tell how a projection fares, by name and path, for a logger.

    For each projected leaf, all its matrices together, with count c of the state:

    - `energy/PATH`, :math:`\|P^T G\|_F^2 / \|G\|_F^2`, NaN where a gradient is zero;
    - `projected_norm/PATH`, :math:`\|P^T G\|_F`;
    - `effective_rank/PATH`, :math:`(\sum_i \lambda_i)^2 / \sum_i \lambda_i^2` of the
      eigenvalues of :math:`R R^T` with :math:`R = P^T G`, the least of a stack: the
      number of directions, from 1 to `rank`, that would hold the coordinates if they
      were spread evenly; NaN where a gradient is zero;
    - `age/PATH`, int32: updates since the one that renewed the basis, the oldest of a
      stack; 0 right after;
    - `refused/PATH`, int32: new bases that failed the check, and were not taken;

    for each leaf `gradient_norm/PATH`, :math:`\|G\|_F`; and the same names alone for
    the whole tree: the energy of all projected leaves together, the norms of all
    gradients and of all coordinates, the least effective rank that is a number, the
    greatest age, the sum of refusals.

    An energy that falls while the age grows asks for a smaller `update_proj_gap`; one
    that is low right after a refresh for a higher rank. Refusals that grow point to
    gradients that are zero or not finite, an effective rank far below `rank` to a rank
    that need not be so large. `captured_energy` has each matrix of a stack, and
    `basis_overlap` what a basis kept of an earlier one.

    Nothing is stored for it: it costs one more projection where it is called and a
    product of coordinates with themselves, under `jit` too, and nothing elsewhere.

    Args:
      tx: a transformation that contains `galore`, however wrapped.
      state: of `tx`, as its update returned it.
      gradients: full size, like params; those of the update, or of any other batch.

    Returns:
      scalars by name, f32 (f64 for f64 gradients) but where said.

    Raises:
      ValueError: `tx` contains no `galore`, or `state` belongs to another tree, as that
        of `layerwise` does.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> tx = galore_optax.galore(optax.adam(1e-3), rank=2)
      >>> grads = {"w": jnp.diag(jnp.array([3.0, 2.0, 1.0, 0.0])), "b": jnp.ones(4)}
      >>> _, state = tx.update(grads, tx.init(grads))
      >>> found = galore_optax.metrics(tx, state, grads)
      >>> for name in ("energy/w", "gradient_norm/b", "gradient_norm", "age"):
      ...     print(f"{name} {found[name]:.3g}")
      energy/w 0.929
      gradient_norm/b 2
      gradient_norm 4.24
      age 0
    """
    records, _ = plans_of(tx, gradients)
    flat = flatten(gradients)
    floating = [x for x in flat.items() if jnp.issubdtype(x[1].dtype, jnp.floating)]
    by_path = dict(floating)
    states = galore_states(records, unboxed(state))
    watched = [
        watch
        for record, found in zip(records, states, strict=True)
        for watch in _watch(record.plan, found, by_path)
    ]
    norms = {path: _norm(value) for path, value in floating}
    return _named(watched, norms)


class _Watched(NamedTuple):
    """Of one projected leaf."""

    path: str
    energy: jax.Array
    projected_norm: jax.Array
    effective_rank: jax.Array
    age: jax.Array
    refused: jax.Array


def _watch(plan: Any, state: GaLoreState, by_path: dict[str, Any]) -> list[_Watched]:
    columns = (
        plan.projected,
        read(plan, state),
        plan.read(state.refresh.last),
        plan.read(state.refresh.refused),
    )
    watched = []
    for matrix, projectors, last, refused in zip(*columns, strict=True):
        found = squares(matrix, projectors, by_path[matrix.path])
        inside, total = jnp.sum(found.inside), jnp.sum(found.total)
        # The state counts the update that may have renewed it, too.
        age = state.count - 1 - jnp.min(last)
        norm = found.unit * jnp.sqrt(inside)
        spread = jnp.min(effective_rank(matrix, found.coordinates))
        numbers = inside / total, norm, spread, age, jnp.sum(refused)
        watched.append(_Watched(matrix.path, *numbers))
    return watched


def _named(
    watched: Sequence[_Watched], norms: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    found = {f"gradient_norm/{path}": norm for path, norm in norms.items()}
    for name in _Watched._fields[1:]:
        found |= {f"{name}/{leaf.path}": getattr(leaf, name) for leaf in watched}
    projected = _together([leaf.projected_norm for leaf in watched])
    whole = _together([norms[leaf.path] for leaf in watched])
    return found | {
        "gradient_norm": _together(list(norms.values())),
        "projected_norm": projected,
        "energy": (projected / whole) ** 2,
        "effective_rank": jnp.nanmin(
            jnp.stack([leaf.effective_rank for leaf in watched])
        ),
        "age": jnp.max(jnp.stack([leaf.age for leaf in watched])),
        "refused": jnp.sum(jnp.stack([leaf.refused for leaf in watched])),
    }


def _norm(value: jax.Array) -> jax.Array:
    return _together(value.astype(accumulation_dtype(value)))


def _together(values: jax.Array | Sequence[jax.Array]) -> jax.Array:
    """The norm of numbers whose squares may be out of range."""
    stacked = jnp.stack(values) if isinstance(values, list) else jnp.asarray(values)
    largest = jnp.max(jnp.abs(stacked))
    unit = jnp.where(largest > 0, largest, 1)
    return unit * jnp.sqrt(jnp.sum((stacked / unit) ** 2))
