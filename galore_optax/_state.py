# SPDX-License-Identifier: Apache-2.0
"""The state of `galore`, how it is laid out, and how it is checked."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from galore_optax._leaves import is_masked
from galore_optax._matrices import Plan
from galore_optax._refresh import Projectors, Refresh


class GaLoreState(NamedTuple):
    """State of `galore`; the field names are the checkpoint format.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> params = {"dense": {"kernel": jnp.ones((16, 32)), "bias": jnp.ones(32)}}
      >>> state = galore_optax.galore(optax.adam(1e-3), rank=4).init(params)
      >>> state.projector["dense"]["kernel"].shape
      (16, 4)
      >>> state.projector["dense"]["bias"]
      MaskedNode()
      >>> state.inner_state[0].mu["dense"]["kernel"].shape
      (4, 32)
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), int32: updates so far
    key: jax.Array  # raw PRNG key of the run, never changed
    # Like params; each projected leaf is (*batch axes, *projected axes, rank), a pair
    # of those for proj_type "full", and MaskedNode where nothing is projected.
    projector: Any
    refresh: Refresh  # when each matrix was refreshed last, how often refused
    inner_state: Any  # of the inner transformation; projected axes have become rank


def arrange(plan: Plan, values: Sequence[Any]) -> Any:
    """`values`, one a projected leaf, as a tree like params."""
    nodes: list[Any] = [optax.MaskedNode()] * len(plan.matrices)
    for matrix, value in zip(plan.projected, values, strict=True):
        nodes[matrix.position] = value
    return plan.flat.treedef.unflatten(nodes)


def as_node(projectors: Projectors) -> Any:
    return projectors if len(projectors) > 1 else projectors[0]


def read(plan: Plan, state: GaLoreState) -> list[Projectors]:
    """The projectors of the projected leaves, checked against `plan`.

    Raises:
      ValueError: the state was made for other leaves, ranks or sides.
    """
    try:
        projectors = plan.flat.subtrees(state.projector)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "the state of galore belongs to another tree of parameters than the updates"
            f" ({error}). Call init with the parameters that are being trained."
        ) from error
    for position, path in enumerate(plan.flat.paths):
        _check_projector(plan, position, path, projectors[position])
    return [_as_tuple(projectors[matrix.position]) for matrix in plan.projected]


def _as_tuple(node: Any) -> Projectors:
    return tuple(node) if isinstance(node, (tuple, list)) else (node,)


def _check_projector(plan: Plan, position: int, path: str, node: Any) -> None:
    matrix = plan.matrices[position]
    found = () if is_masked(node) else tuple(x.shape for x in _as_tuple(node))
    expected = (
        tuple(matrix.projector_shape(side) for side in matrix.sides) if matrix else ()
    )
    if found != expected:
        raise ValueError(
            f"the state holds {_projectors(found)} for '{path}', but this configuration"
            f" needs {_projectors(expected)}. Restore the state with the rank,"
            " proj_type and weight_dimension_numbers it was saved with, or call init"
            " for a new one."
        )


def _projectors(shapes: tuple[tuple[int, ...], ...]) -> str:
    if not shapes:
        return "no projector"
    rank = shapes[0][-1]
    return f"a projector of rank {rank} and shape {' and '.join(map(str, shapes))}"
