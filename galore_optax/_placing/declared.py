# SPDX-License-Identifier: Apache-2.0
"""What was declared of the leaves at hand, put into effect while a step is traced."""

from collections.abc import Sequence

import jax

from galore_optax._context import current
from galore_optax._placing import rules
from galore_optax._selection.matrices import Plan
from galore_optax._xla.sharding import Names, place


def spread() -> Names:
    """The mesh axes over which a state is split besides."""
    declared = current().declared
    return declared.spread if declared else ()


def beside_moments(plan: Plan, values: Sequence[jax.Array]) -> list[jax.Array]:
    """`values`, one a leaf, where the moments lie that an inner adds them to.

    Else, spread moments would meet gradients that are split in another way, which XLA
    settles by its own lights and Explicit axes refuse.
    """
    declared = current().declared
    if declared is None or not declared.spread:
        return list(values)
    return [
        place(
            value,
            rules.coordinates(matrix, declared.leaves[path], declared.spread)
            if matrix
            else rules.moment(declared.leaves[path], value.shape, declared.spread),
        )
        for path, matrix, value in zip(
            plan.flat.paths, plan.matrices, values, strict=True
        )
    ]
