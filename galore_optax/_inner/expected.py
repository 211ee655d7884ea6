# SPDX-License-Identifier: Apache-2.0
"""Refuses a state that the inner transformation did not make."""

from typing import Any

import jax
import jax.numpy as jnp

from galore_optax._selection.leaves import flatten
from galore_optax._storage.moments import holds_coded, name


def check_state(expected: Any, found: Any) -> None:
    """Raises unless `found` is built like a state that the inner makes itself."""
    if flatten(expected).treedef == flatten(found).treedef:
        return
    coded = [holds_coded(x) for x in (expected, found)]
    if coded[0] != coded[1] and _outline(expected) == _outline(found):
        needs, has = ("eight bits" if x else "a floating dtype" for x in coded)
        raise ValueError(
            f"the state given to update has moments in {has}, and this optimizer keeps"
            f" them in {needs}. galore_optax.convert_state(state, old, new, params)"
            " turns one into the other; or begin anew with tx.init(params)."
        )
    raise ValueError(
        "the state given to update is not of this inner optimizer: it needs"
        f" {_outline(expected)}, and was given {_outline(found)}. Restore the state"
        " with the optimizer it was saved with, or begin anew with tx.init(params)."
        " Where both names are the same, labels or masks of the inner go by the number"
        " of axes or by sizes, which coordinates do not share: choose them by path."
    )


def check_dtypes(expected: Any, found: Any) -> None:
    """Raises unless moments have the floating dtypes that the inner gives them."""
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(expected),
        jax.tree.leaves(found),
        strict=True,
    )
    for (path, wanted), given in pairs:
        floats = all(jnp.issubdtype(x.dtype, jnp.floating) for x in (wanted, given))
        if floats and wanted.dtype != given.dtype:
            raise ValueError(
                f"the state given to update has '{name(path)}' in {given.dtype}, and"
                f" this optimizer keeps it in {wanted.dtype}, by its moment_dtype."
                " galore_optax.convert_state(state, old, new, params) turns one into"
                " the other; or begin anew with tx.init(params)."
            )


def _outline(state: Any) -> str:
    """The types that a state is nested of, as `(ScaleByAdamState, EmptyState)`."""
    if isinstance(state, tuple) and type(state) is tuple:
        return f"({', '.join(map(_outline, state))})"
    return type(state).__name__
