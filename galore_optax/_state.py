# SPDX-License-Identifier: Apache-2.0
"""The state of `galore`, how it is laid out, and how it is checked."""

from typing import Any, NamedTuple

import jax

from galore_optax._projector.refresh import Refresh
from galore_optax._selection.leaves import is_box, is_masked
from galore_optax._selection.matrices import Matrix, Plan
from galore_optax._storage.projectors import Projectors, describe_stored
from galore_optax.codes.affine import QuantizedProjector


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
    # Like params; each projected leaf is (*batch axes, *projected axes, rank), or a
    # QuantizedProjector, a pair of those for proj_type "full", and MaskedNode where
    # nothing is projected.
    projector: Any
    refresh: Refresh  # by leaf: when each matrix was refreshed last, how often refused
    inner_state: Any  # of the inner transformation; projected axes have become rank
    # By leaf, what `residual` remembers of each matrix, an f32 number; () without it.
    residual: Any = ()


def check_type(state: Any) -> None:
    """Raises unless `state` is one that `galore` made."""
    if isinstance(state, GaLoreState):
        _refuse_variables(state)
        return
    fields = ", ".join(GaLoreState._fields)
    raise ValueError(
        f"update of galore was given a {type(state).__name__} {_shown(state)}; it needs"
        f" the GaLoreState({fields}) that its init made. A state of another optimizer"
        " cannot be used; one that a checkpointer returned as plain"
        " containers is restored by giving it a target:"
        " restore(path, jax.eval_shape(tx.init, params))."
    )


def _refuse_variables(state: GaLoreState) -> None:
    if is_box(state.count):
        raise ValueError(
            "the state is that of an nnx.Optimizer, in Variables. Pass"
            " nnx.as_pure(optimizer.opt_state), and take what comes back by"
            " nnx.update(optimizer.opt_state, nnx.state(new_state))."
        )


def _shown(state: Any) -> str:
    if isinstance(state, dict):
        return f"with the keys {list(state)[:5]}"
    if isinstance(state, (tuple, list)):
        return f"of {[type(part).__name__ for part in state][:5]}"
    return "as its state"


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
    _check_counters(plan, state.refresh)
    return [_as_tuple(projectors[matrix.position]) for matrix in plan.projected]


def _as_tuple(node: Any) -> Projectors:
    is_pair = isinstance(node, (tuple, list)) and not _is_quantized(node)
    return tuple(node) if is_pair else (node,)


def _is_quantized(node: Any) -> bool:
    return isinstance(node, QuantizedProjector)


def _check_projector(plan: Plan, position: int, path: str, node: Any) -> None:
    found = () if is_masked(node) else tuple(map(describe_stored, _as_tuple(node)))
    expected = _expected(plan.matrices[position])
    if found != expected:
        raise ValueError(
            f"the state holds {_projectors(found)} for '{path}', but this configuration"
            f" needs {_projectors(expected)}. Restore the state with the rank,"
            " proj_type, projector_dtype and weight_dimension_numbers it was saved"
            " with, or call init for a new one."
        )


def _check_counters(plan: Plan, refresh: Refresh) -> None:
    shapes = [matrix.batch_shape for matrix in plan.projected]
    for counters in (refresh.last, refresh.refused):
        if [x.shape for x in jax.tree.leaves(counters)] != shapes:
            raise ValueError(
                "the state counts refreshes as galore_optax 0.1 did, in one vector for"
                " all matrices; since 0.2 each leaf has counters of its own. Finish"
                " that run with 0.1, or keep its params and call init with them."
            )


def _expected(matrix: Matrix | None) -> tuple[str, ...]:
    if matrix is None:
        return ()
    shapes = map(matrix.projector_shape, matrix.sides)
    return tuple(matrix.storage.expected(len(matrix.batch), x) for x in shapes)


def _projectors(found: tuple[str, ...]) -> str:
    return f"a projector of {' and of '.join(found)}" if found else "no projector"
