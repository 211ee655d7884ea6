# SPDX-License-Identifier: Apache-2.0
"""`einsum` of arrays that carry the letters of their axes."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from galore_optax._xla.sharding import explicit_sharding
from galore_optax.backward.addend import Term


class Named(NamedTuple):
    """An array and the letters of its axes."""

    array: jax.Array
    axes: str

    def times(self, basis: Term, projected: str, precision: Any) -> "Named":
        """The axes `projected` replaced by the rank axis of `basis`, in our dtype."""
        dtype = self.array.dtype
        axes = product_axes(self.axes, basis, projected)
        factors = [self, Named(basis.array(dtype), basis.axes)]
        array = einsum(factors, axes, dtype, precision, _sharding(factors, axes))
        return Named(array.astype(dtype), axes)


def product_axes(axes: str, basis: Term, projected: str) -> str:
    """The axes of a product with `basis`, summed over `projected`."""
    kept = [x for x in axes if x not in projected]
    more = [x for x in basis.axes if x not in projected and x not in kept]
    return "".join((*kept, *more))


def einsum(
    factors: Sequence[Named], axes: str, dtype: Any, precision: Any, sharding: Any
) -> jax.Array:
    """The product of `factors`, added up in at least `dtype`."""
    with jax.numpy_dtype_promotion("standard"):
        common = functools.reduce(jnp.promote_types, [x.array.dtype for x in factors])
        wide = jnp.promote_types(common, dtype)
    return jnp.einsum(
        f"{','.join(x.axes for x in factors)}->{axes}",
        *(x.array.astype(common) for x in factors),
        precision=precision,
        preferred_element_type=wide,
        out_sharding=sharding,
    )


def _sharding(factors: Sequence[Named], axes: str) -> NamedSharding | None:
    """Of a product whose axes keep the mesh axes that they have in its factors."""
    mesh: Any = None
    found: dict[str, Any] = {}
    for array, letters in reversed(factors):
        sharding = explicit_sharding(array)
        if sharding is not None:
            mesh = sharding.mesh
            found.update(zip(letters, sharding.spec, strict=False))
    spec = PartitionSpec(*map(found.get, axes))
    return None if mesh is None else NamedSharding(mesh, spec)
