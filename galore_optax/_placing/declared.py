# SPDX-License-Identifier: Apache-2.0
"""What was declared of the leaves at hand, put into effect while a step is traced."""

from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding

from galore_optax._context import current
from galore_optax._placing import rules
from galore_optax._selection.matrices import Matrix, Plan
from galore_optax._xla.sharding import Names, place, sharding_of


def spread() -> Names:
    """The mesh axes over which a state is split besides."""
    declared = current().declared
    return declared.spread if declared else ()


def beside_moments(plan: Plan, values: Sequence[jax.Array]) -> list[jax.Array]:
    """`values`, one a leaf, where the moments lie that an inner adds them to.

    Else, moments would meet gradients that are split in another way, which XLA settles
    by its own lights and Explicit axes refuse.
    """
    over, leaves = spread(), zip(plan.flat.items(), plan.matrices, strict=True)
    lying = [(sharding_of(*item), matrix) for item, matrix in leaves]
    return [
        value
        if leaf is None or not (matrix or over)
        else place(value, _of_moment(matrix, leaf, value.shape, over))
        for value, (leaf, matrix) in zip(values, lying, strict=True)
    ]


def _of_moment(
    matrix: Matrix | None, leaf: NamedSharding, shape: tuple[int, ...], over: Names
) -> NamedSharding:
    if matrix is None:
        return rules.moment(leaf, shape, over)
    return rules.coordinates(matrix, leaf, over)
