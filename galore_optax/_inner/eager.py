# SPDX-License-Identifier: Apache-2.0
"""`update` outside of `jit`, compiled all the same.

Its loops are functions made anew at every call, which JAX would compile anew,
and run operation by operation a step would hold every intermediate of the whole tree.
"""

from typing import Any

import jax
import numpy as np
import optax

from galore_optax._context import current


def compiled(
    transformation: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """`transformation`, its `update` compiled once where it is called un-jitted.

    Arguments that are no arrays, such as functions, are for `update` to judge: calls
    with these run as they are written.
    """
    run = jax.jit(_Call(transformation.update), static_argnums=1)

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        static = {k: v for k, v in extra_args.items() if isinstance(v, bool | None)}
        arrays = {k: v for k, v in extra_args.items() if k not in static}
        trees = (updates, state, params, arrays)
        if current().whole is not None or not all(
            map(_is_array, jax.tree.leaves(trees))
        ):
            return transformation.update(updates, state, params, **extra_args)
        return run(trees, tuple(static.items()))

    return optax.GradientTransformationExtraArgs(transformation.init, update)


class _Call:
    """`update` with its static arguments apart; has no name that JAX could show."""

    def __init__(self, update: Any) -> None:
        self.update = update

    def __call__(self, trees: Any, static: tuple[tuple[str, Any], ...]) -> Any:
        updates, state, params, arrays = trees
        return self.update(updates, state, params, **dict(static), **arrays)


def _is_array(leaf: Any) -> bool:
    traced = isinstance(leaf, jax.core.Tracer)
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, float)) and not traced
