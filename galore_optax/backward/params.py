# SPDX-License-Identifier: Apache-2.0
"""Parameters of equations that JAX's versions call by different names."""

from typing import Any


def scan_parts(equation: Any, values: list[Any]) -> tuple[list[Any], ...]:
    """What a scan takes: constants, the carry, and what it takes slices of."""
    p = equation.params
    if "ft_in" in p:  # from 0.11
        consts, carry, stacks = map(list, p["ft_in"].update(values).unpack())
        return consts, carry, stacks
    first, last = p["num_consts"], p["num_consts"] + p["num_carry"]
    return values[:first], values[first:last], values[last:]


def manual_axes(equation: Any) -> frozenset[Any]:
    """Axes of the mesh that a `shard_map` maps over."""
    p = equation.params
    return p["newly_manual_axes"] if "newly_manual_axes" in p else p["manual_axes"]
