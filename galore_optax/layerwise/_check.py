# SPDX-License-Identifier: Apache-2.0
"""Whether a transformation treats leaves one by one, read off its jaxpr."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import optax
from jax.extend import core

from galore_optax._context import within
from galore_optax._selection.leaves import flatten
from galore_optax._xla.flow import called, follow
from galore_optax._xla.order import only_waits

Leaves: TypeAlias = frozenset[int]  # of whose gradients or parameters a value is made
_NONE: Leaves = frozenset()


def refuse_mixing(tx: optax.GradientTransformationExtraArgs, params: Any) -> None:
    """Raises unless each update is made of one leaf's gradient and parameter alone.

    Raises:
      ValueError: the first update, or the first entry of the state, that is not.
    """
    shapes = jax.eval_shape(lambda tree: tree, params)
    with within(records=[]):  # asked about: no state to train with
        state = jax.eval_shape(lambda tree: tx.init(tree), shapes)

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return tx.update(gradients, state, params, refresh=False)

    jaxpr, results = jax.make_jaxpr(update, return_shape=True)(shapes, state, shapes)
    number = len(jax.tree.leaves(shapes))
    each = [frozenset({leaf}) for leaf in range(number)]
    nothing = [_NONE] * len(jax.tree.leaves(state))
    found = follow(jaxpr, [*each, *nothing, *each], _apply, _NONE)
    paths = flatten(shapes).paths
    for leaf, leaves in enumerate(found[:number]):
        if leaves - {leaf}:
            raise ValueError(_mixes(f"the update of '{paths[leaf]}'", leaves, paths))
    names = jax.tree_util.tree_leaves_with_path(results[1])
    for (path, _), leaves in zip(names, found[number:], strict=True):
        if len(leaves) > 1:
            name = jax.tree_util.keystr(path)
            raise ValueError(_mixes(f"its state{name}", leaves, paths))


def _apply(equation: Any, inputs: list[Leaves]) -> list[Leaves]:
    if only_waits(equation):
        return inputs[:1]
    jaxpr = called(equation)
    if jaxpr is not None:
        return follow(jaxpr, inputs, _apply, _NONE)
    if equation.primitive.name == "cond":
        return _apply_cond(equation.params["branches"], inputs)
    return [_NONE.union(*inputs)] * len(equation.outvars)


def _apply_cond(
    branches: Sequence[core.ClosedJaxpr], inputs: list[Leaves]
) -> list[Leaves]:
    predicate, *operands = inputs
    results = [follow(branch, operands, _apply, _NONE) for branch in branches]
    return [predicate.union(*column) for column in zip(*results, strict=True)]


def _mixes(what: str, leaves: Leaves, paths: Sequence[str]) -> str:
    shown = ", ".join(repr(paths[leaf]) for leaf in sorted(leaves)[:3])
    more = f" and {len(leaves) - 3} more" if len(leaves) > 3 else ""
    return (
        "this transformation needs the gradients of several leaves at once, but layer"
        f" by layer there is never more than one layer's: {what} is made of {shown}"
        f"{more}. For clipping give make_step(..., clip="
        "layerwise.clip_by_global_norm(1.0)); other such transformations need the plain"
        " step."
    )
