# SPDX-License-Identifier: Apache-2.0
"""Gradients projected ahead of the update, so that they can be added up small."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax._asking.record import (
    Recorded,
    galore_states,
    heard,
    replaced,
    updates_that_reach,
)
from galore_optax._inner.params_use import is_affine
from galore_optax._projector.refresh import When
from galore_optax._selection.leaves import flatten
from galore_optax._state import GaLoreState, check_type
from galore_optax._transform import project_all, refuse_coordinates, renew


def project_gradients(
    tx: optax.GradientTransformation,
    gradients: Any,
    state: Any,
    params: Any,
    *,
    refresh: When = None,
    axis_name: Any = None,
) -> tuple[Any, Any]:
    r"""Projects gradients with the bases in `state`, renewing first what is due.

    .. math:: R = P^T G

    For gradient accumulation in (rank, n) instead of (m, n): the first micro-batch of
    a step decides the bases, the others only project, and the mean is what
    `update_projected` takes. Averages commute with the projection, so that on a
    step without refresh the result is that of accumulating at full size.

    Args:
      tx: the transformation; `galore` anywhere inside it, or nowhere, in which case
        gradients are returned as they are.
      gradients: a tree like params.
      state: of `tx`.
      params: the parameters.
      refresh: as in `update` of `galore`; `False` from the second micro-batch on.
      axis_name: inside `jax.shard_map`, the mesh axes, one name or several, over whose
        devices gradients are averaged, as `jax.lax.pmean` would. What is sent is the
        coordinates, in the dtype of the gradients, and the gradients themselves on
        steps with a refresh only: all devices take one basis, that of the mean.

    Returns:
      a tree like `gradients`, each projected leaf in coordinates, in the dtype of the
      products (f32 for 16-bit leaves); and the state with the bases used.

    Raises:
      ValueError: `state` or `gradients` belong to another tree; what comes before
        `galore` in `tx` is not linear, such as clipping, and would see coordinates;
        `galore` has a residual, which needs whole gradients; inside `shard_map` with
        `check_vma`, gradients differ from device to device, a refresh may be due, and
        there is no `axis_name`. Without `check_vma` nothing tells that they differ.

    Example:
      >>> import galore_optax, jax, jax.numpy as jnp, optax
      >>> tx = galore_optax.galore(optax.adam(1e-3), rank=4)
      >>> params = {"w": jnp.ones((16, 32))}
      >>> state, total = tx.init(params), None
      >>> for number, gradients in enumerate([params, params]):  # micro-batches
      ...     low, state = galore_optax.project_gradients(
      ...         tx, gradients, state, params, refresh=None if number == 0 else False)
      ...     total = low if total is None else jax.tree.map(jnp.add, total, low)
      >>> total["w"].shape
      (4, 32)
      >>> mean = jax.tree.map(lambda x: x / 2, total)
      >>> updates, state = galore_optax.update_projected(tx, mean, state, params)

    Source: Zhao et al., arXiv 2403.03507, section 4.3, asks for one update a batch.
    """
    records, _ = heard(tx, params)
    given, local = state, gradients
    for record, old in zip(records, galore_states(records, state), strict=True):
        gradients, new = _project(record, gradients, old, refresh, axis_name)
        state = replaced(state, old, new)
    if records:
        _refuse_what_precedes(tx, gradients, given, params)
    if axis_name is not None:
        gradients = _averaged(gradients, local, axis_name)
    return gradients, state


def _averaged(low: Any, gradients: Any, axis_name: Any) -> Any:
    """Over devices; sent in the dtypes of the gradients."""

    def one(x: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.lax.pmean(x.astype(gradient.dtype), axis_name).astype(x.dtype)

    return jax.tree.map(one, low, gradients)


def update_projected(
    tx: optax.GradientTransformation,
    coordinates: Any,
    state: Any,
    params: Any,
    **extra_args: Any,
) -> tuple[Any, Any]:
    r"""`tx.update`, given gradients that `project_gradients` made small.

    .. math:: U, s = \mathrm{inner}(R, s), \quad \Delta W = \mathrm{scale} \cdot P U

    Args:
      tx: the transformation; `galore` anywhere inside it, or nowhere.
      coordinates: a tree like params, each projected leaf with rank in place of its
        projected axes; of `project_gradients`, or a mean of such.
      state: of `tx`, as `project_gradients` returned it: no basis is renewed here.
      params: the parameters.
      **extra_args: of `tx.update`.

    Returns:
      full-size updates and the new state, as `tx.update` does.

    Raises:
      ValueError: the coordinates are those of another tree, rank or side, or `tx`
        adds up gradients of full size.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> tx = galore_optax.galore(optax.adam(1e-3), rank=4)
      >>> params = {"w": jnp.ones((16, 32))}
      >>> low, state = galore_optax.project_gradients(
      ...     tx, params, tx.init(params), params)
      >>> updates, state = galore_optax.update_projected(tx, low, state, params)
      >>> updates["w"].shape
      (16, 32)
    """
    _check_accumulation(coordinates, state)
    # What is a class of its own, as ours for micro-steps, takes extra arguments too.
    known = isinstance(tx, optax.GradientTransformation)
    update: Any = optax.with_extra_args_support(tx).update if known else tx.update
    return update(coordinates, state, params, projected=True, **extra_args)


def _check_accumulation(coordinates: Any, state: Any) -> None:
    def accumulates(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    low = jax.tree.leaves_with_path(coordinates)
    for node in filter(accumulates, jax.tree.leaves(state, is_leaf=accumulates)):
        sums = jax.tree.leaves(node.acc_grads)
        for (path, x), kept in zip(low, sums, strict=False):
            if jnp.shape(x) != jnp.shape(kept):
                raise ValueError(
                    f"{jax.tree_util.keystr(path, simple=True, separator='/')}: its"
                    f" coordinates are {jnp.shape(x)}, and MultiSteps adds up gradients"
                    f" of {jnp.shape(kept)}. Use galore_optax.ProjectedMultiSteps."
                )


def _refuse_what_precedes(
    tx: optax.GradientTransformation, low: Any, state: Any, params: Any
) -> None:
    """Raises where something before `galore` would see coordinates, and mind it."""
    leaves: list[Any]
    treedef: Any
    leaves, treedef = jax.tree.flatten(low)

    def reaching(leaves: list[Any]) -> list[Any]:
        updates = treedef.unflatten(leaves)
        return jax.tree.leaves(updates_that_reach(tx, updates, state, params))

    try:
        linear = is_affine(reaching, leaves)
    except (TypeError, ValueError):
        return  # no update will be made of these; what is wrong shows up there
    if not linear:
        raise ValueError(
            "what precedes galore in this transformation is not a linear function of"
            " the gradients (clipping, for instance). It would see their coordinates,"
            " whose norms and sizes are others. Apply it to the gradients before"
            " project_gradients, or put it inside galore, where it is meant to see"
            " coordinates: galore(optax.chain(optax.clip_by_global_norm(1.0), inner))."
        )


def _project(
    record: Recorded,
    gradients: Any,
    state: GaLoreState,
    refresh: When,
    axis_name: Any,
) -> tuple[Any, GaLoreState]:
    """`gradients` with the leaves of one `galore` in coordinates, and its state."""
    check_type(state)
    refuse_coordinates(record.config)
    flat = flatten(gradients)
    by_path = dict(zip(flat.paths, flat.nodes, strict=True))
    nodes = tuple(by_path[path] for path in record.plan.flat.paths)
    plan = record.plan.with_values(nodes)
    state = renew(plan, record.config, record.inner, state, refresh, axis_name)
    low = project_all(plan, state)
    found = {matrix.path: low[matrix.position] for matrix in plan.projected}
    values = [found.get(path, value) for path, value in flat.items()]
    return flat.rebuild(values, [path not in found for path in flat.paths]), state
