# SPDX-License-Identifier: Apache-2.0
"""Checks of `rank`, `update_proj_gap` and `scale`, whole or of one leaf."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax._types import Scalar


def _where(path: str) -> str:
    return f" of '{path}'" if path else ""


def check_mask(mask: Any) -> None:
    """Refuses a `mask` that is one value: what a callable makes of a step."""
    if isinstance(mask, (bool, np.bool_)) or _is_number(mask):
        raise TypeError(
            f"mask={mask!r} must be a tree like params or a callable of params. To let"
            " nothing decay, write weight_decay=0."
            f"{called_with_the_step('mask', mask)}"
        )


def called_with_the_step(name: str, value: Any) -> str:
    """A hint, where `value` may be what `optax.inject_hyperparams` made of a callable.

    It takes every callable for a schedule, unless it is among its static_args.
    """
    if not isinstance(value, (bool, np.bool_)) and not _is_number(value):
        return ""
    return (
        " optax.inject_hyperparams calls what can be called with the step: write"
        " galore_optax.inject_hyperparams(...), or"
        f" static_args=(*galore_optax.STATIC_ARGS, {name!r})."
    )


def check_rank(rank: Any, path: str = "") -> int | float:
    """`rank` as an int or as a share, or an error that says what to write."""
    if isinstance(rank, jax.core.Tracer):
        raise TypeError(
            f"rank{_where(path)} is traced, but it decides shapes and must be a Python"
            " int. Write galore_optax.inject_hyperparams(...), or"
            " optax.inject_hyperparams(..., static_args=galore_optax.STATIC_ARGS)."
        )
    if isinstance(rank, (float, np.floating)):
        return _share(float(rank), path)
    share = ", a share of the shorter dimension such as 0.25"
    return _positive_int("rank", rank, path, share)


def _share(rank: float, path: str) -> float:
    if 0 < rank < 1:
        return rank
    raise ValueError(
        f"rank={rank!r}{_where(path)} must be a positive int, or a share of the shorter"
        " dimension between 0 and 1, such as 0.25. Without projection use the inner"
        " optimizer alone."
    )


def rank_of(asked: int | float, dimension: int) -> int:
    """A rank, or the nearest to a share of `dimension`, which is at least 1."""
    if isinstance(asked, float):
        return max(1, round(asked * dimension))
    return asked


def check_gap(gap: Any, path: str = "") -> Scalar:
    """`update_proj_gap` as a positive int, or a traced integer scalar."""
    if _is_scalar_array(gap, jnp.integer):
        return gap
    return _positive_int("update_proj_gap", gap, path)


def check_scale(scale: Any, path: str = "") -> Scalar:
    """`scale` as a positive finite number, or a traced scalar."""
    if _is_scalar_array(scale, jnp.floating):
        return scale
    if not isinstance(scale, (int, float, np.number)) or isinstance(scale, bool):
        raise TypeError(
            f"scale{_where(path)} is {scale!r}; it must be a number, a callable of one"
            " galore_optax.Leaf or a dictionary of such by pattern. A schedule goes"
            " through optax.inject_hyperparams."
        )
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(
            f"scale={scale!r}{_where(path)} must be positive and finite; the reference"
            " uses 0.25. To freeze a leaf use optax.partition with optax.set_to_zero()."
        )
    return float(scale)


def check_full_size_rate(rate: Any) -> Scalar | None:
    """`full_size_rate` as a positive finite number, a traced scalar, or none."""
    if rate is None or _is_scalar_array(rate, jnp.floating):
        return rate
    if not isinstance(rate, (int, float, np.number)) or isinstance(rate, bool):
        raise TypeError(
            f"full_size_rate={rate!r} must be a number, by which the updates of leaves"
            " at full size are multiplied. A schedule goes through"
            " galore_optax.inject_hyperparams."
        )
    if not (math.isfinite(rate) and rate > 0):
        raise ValueError(
            f"full_size_rate={rate!r} must be positive and finite, such as 0.25 beside"
            " scale=0.25. To freeze leaves use optax.partition with"
            " optax.set_to_zero()."
        )
    return float(rate)


def _is_scalar_array(value: Any, kind: Any) -> bool:
    return _is_number(value) and bool(jnp.issubdtype(value.dtype, kind))


def _is_number(value: Any) -> bool:
    return isinstance(value, jax.Array) and value.ndim == 0


def _positive_int(name: str, value: Any, path: str, other: str = "") -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(
            f"{name}={value!r}{_where(path)} must be a positive int{other}, a callable"
            " of one galore_optax.Leaf that returns one, or a dictionary of such by"
            " pattern."
        )
    return number
