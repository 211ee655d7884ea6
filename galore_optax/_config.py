# SPDX-License-Identifier: Apache-2.0
"""The arguments of `galore`, checked once."""

import dataclasses
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax import moments as at_refresh
from galore_optax import subspace as subspaces
from galore_optax._arguments import (
    called_with_the_step,
    check_full_size_rate,
    check_gap,
    check_rank,
    check_scale,
)
from galore_optax._selection.dimensions import WeightDimensionNumbers
from galore_optax._selection.matrices import Matrix
from galore_optax._selection.patterns import per_leaf
from galore_optax._selection.rule import Selection
from galore_optax._storage.numbers import Numbers
from galore_optax._storage.projectors import Storage, storage_of
from galore_optax._types import PerLeaf, ProjType, Scalar
from galore_optax.moments import AtRefresh
from galore_optax.refresh import RefreshRule
from galore_optax.residual import Residual
from galore_optax.subspace import ByNumbers, Subspace

DEFAULT_SCALE = 0.25


@dataclasses.dataclass(frozen=True)
class Config:
    """The arguments of `galore`, checked."""

    selection: Selection
    subspace: Subspace
    stagger: bool
    moment_dtype: jnp.dtype | None
    seed: int | jax.Array
    moments: AtRefresh
    residual: Residual | None
    full_size_rate: Scalar | None
    refresh: RefreshRule | None
    needs_whole: str = ""  # what needs whole gradients, if anything does

    def inner_dtype(self, matrix: Matrix | None, dtype: jnp.dtype) -> jnp.dtype:
        """What the inner computes in for a leaf of `dtype`.

        A leaf that is not projected is what the inner alone would make of it. The
        moments of a projected one are small, and b2=0.999 adds increments to the second
        that bf16 rounds away: they are at least f32.
        """
        dtype = jax.dtypes.canonicalize_dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            return dtype
        if self.moment_dtype is not None:
            return self.moment_dtype
        wide = jnp.dtype(jnp.float32)
        return wide if matrix and dtype.itemsize < wide.itemsize else dtype


class Projection(TypedDict, total=False):
    """The arguments of `galore` beside `inner`, which it documents; for `Unpack`."""

    rank: PerLeaf[int | float]
    update_proj_gap: PerLeaf[Scalar]
    scale: PerLeaf[Scalar] | None
    full_size_rate: Scalar | None
    proj_type: ProjType
    subspace: Subspace | None
    weight_dimension_numbers: WeightDimensionNumbers
    stagger: bool
    projector_dtype: Any
    moment_dtype: Any
    moments: AtRefresh | None
    refresh: RefreshRule | None
    seed: int | jax.Array


def make_config(projection: Projection, residual: Any = None) -> Config:
    """Of all arguments, checked, and checked against each other."""
    scale = projection["scale"]
    subspace, moments = _method(projection["subspace"]), _moments(projection["moments"])
    _refuse_turning(moments, subspace)
    _refuse_aligning(moments, subspace)
    _check_residual(residual, projection["proj_type"])
    return Config(
        selection=Selection(
            per_leaf("rank", projection["rank"], check_rank),
            per_leaf("update_proj_gap", projection["update_proj_gap"], check_gap),
            per_leaf("scale", DEFAULT_SCALE if scale is None else scale, check_scale),
            projection["proj_type"],
            projection["weight_dimension_numbers"],
            _storage(projection["projector_dtype"], subspace),
        ),
        subspace=subspace,
        stagger=_flag("stagger", projection["stagger"]),
        moment_dtype=_floating("moment_dtype", projection["moment_dtype"]),
        seed=projection["seed"],
        moments=moments,
        residual=residual,
        full_size_rate=check_full_size_rate(projection["full_size_rate"]),
        refresh=_rule(projection["refresh"], subspace),
        needs_whole="" if residual is None else f"residual={residual!r}",
    )


def _method(subspace: Any) -> Subspace:
    if subspace is None:
        return subspaces.power()
    if not isinstance(subspace, Subspace) or isinstance(subspace, type):
        raise TypeError(
            f"subspace={subspace!r} is no subspace method. Write one of"
            " galore_optax.subspace.power(), randomized(), eigh(), svd(), random(), or"
            " another, or an object with the methods of galore_optax.subspace.Subspace."
        )
    return subspace


def _storage(projector_dtype: Any, subspace: Subspace) -> Storage:
    if not isinstance(subspace, ByNumbers):
        return storage_of(projector_dtype)
    if projector_dtype is not None:
        raise ValueError(
            f"projector_dtype={projector_dtype!r} has no effect on {subspace!r}, which"
            " stores a number a column and makes projectors anew beside each product."
            " Leave it out, or use another subspace."
        )
    return Numbers(subspace)


def _moments(moments: Any) -> AtRefresh:
    if moments is None:
        return at_refresh.keep()
    if not isinstance(moments, AtRefresh) or isinstance(moments, type):
        raise TypeError(
            f"moments={moments!r} says not what becomes of moments at a refresh. Write"
            " one of galore_optax.moments.keep(), reset(), rotate(), transfer(), or"
            " pass an object with the methods of galore_optax.moments.AtRefresh."
        )
    return moments


def _rule(refresh: Any, subspace: Subspace) -> RefreshRule | None:
    if refresh is None:
        return None
    if not isinstance(refresh, RefreshRule) or isinstance(refresh, type):
        raise TypeError(
            f"refresh={refresh!r} is no refresh rule. Write"
            " galore_optax.refresh.lazy(), or pass an object with the method of"
            " galore_optax.refresh.RefreshRule."
        )
    if not subspace.orthonormal:
        raise ValueError(
            f"refresh={refresh!r} goes by the overlap of subspaces, which is read off"
            f" orthonormal bases, and those of {subspace!r} are not. Use another"
            " subspace, or no rule."
        )
    return refresh


def _refuse_turning(moments: AtRefresh, subspace: Subspace) -> None:
    if moments.rotates and not subspace.orthonormal:
        raise ValueError(
            f"moments={moments!r} turns moments by P_newᵀ P_old, which is a rotation"
            f" only between orthonormal bases, and those of {subspace!r} are not. Use"
            " an orthonormal subspace, or moments=galore_optax.moments.transfer()."
        )


def _refuse_aligning(moments: AtRefresh, subspace: Subspace) -> None:
    if moments.align_signs and isinstance(subspace, ByNumbers):
        raise ValueError(
            f"moments={moments!r} gives columns other signs, and those of {subspace!r}"
            " are made of their numbers alone. Use moments=galore_optax.moments.keep()."
        )


def _check_residual(residual: Any, proj_type: Any) -> None:
    if residual is None:
        return
    if not isinstance(residual, Residual) or isinstance(residual, type):
        raise TypeError(
            f"residual={residual!r} is no residual. Write galore_optax.residual.fira()"
            " or apollo(), or pass an object with the attribute and the method of"
            " galore_optax.residual.Residual."
        )
    if proj_type == "full":
        raise ValueError(
            f"residual={residual!r} goes by the columns of the side that is not"
            ' projected, and proj_type="full" projects both. Use "std", or no residual.'
        )


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}={value!r} must be True or False.")
    return bool(value)


def _floating(name: str, dtype: Any) -> jnp.dtype | None:
    if dtype is None:
        return None
    if _is_floating(dtype):
        return jnp.dtype(dtype)
    raise TypeError(
        f"{name}={dtype!r} must be a floating-point dtype, such as jnp.bfloat16, or"
        f" None.{called_with_the_step(name, dtype)}"
    )


def _is_floating(dtype: Any) -> bool:
    if isinstance(dtype, jax.Array):  # NumPy would take its dtype
        return False
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False
