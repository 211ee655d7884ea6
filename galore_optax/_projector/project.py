# SPDX-License-Identifier: Apache-2.0
"""Project and lift: `R = PᵀG` and `ΔW = scale · P U`, for batches of matrices.

With `proj_type="full"` there are two projectors, and `R = P₁ᵀ G P₂`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from galore_optax._selection.matrices import Matrix, Side
from galore_optax._storage.projectors import Floating, Projector, Storage
from galore_optax._xla.order import after, rank_first
from galore_optax._xla.sharding import (
    explicit_sharding,
    leaf_sharding,
    letter_sharding,
    on_mesh,
    place,
    replicated,
)


def accumulation_dtype(*arrays: Any) -> jnp.dtype:
    """At least f32, f64 where an operand is."""
    # Of our own accord, and so also where users forbid implicit promotion.
    with jax.numpy_dtype_promotion("standard"):
        dtypes = (array.dtype for array in arrays)
        return jnp.dtype(functools.reduce(jnp.promote_types, dtypes, jnp.float32))


def project(
    matrix: Matrix, projectors: Sequence[Projector], gradient: jax.Array
) -> jax.Array:
    """`PᵀG`: the projected axes of `gradient` replaced by one rank axis, in place."""
    sharding = explicit_sharding(gradient)
    for side, projector in zip(matrix.sides, projectors, strict=True):
        product = _product(matrix, side, sharding, on_mesh(gradient))
        gradient = _project(product, projector, gradient)
    return gradient


def lift(
    matrix: Matrix,
    projectors: Sequence[Projector],
    update: jax.Array,
    sharding: NamedSharding | None,
) -> jax.Array:
    """`P U`, of the shape of the leaf; `sharding` is its under an Explicit mesh."""
    pairs = list(zip(matrix.sides, projectors, strict=True))
    for side, projector in reversed(pairs):
        product = _product(matrix, side, sharding, on_mesh(update))
        update = _lift(product, projector, update)
    return update


@dataclasses.dataclass(frozen=True)
class _Product:
    """All that is static of a product with one projector."""

    side: Side
    storage: Storage
    shape: tuple[int, ...]  # of the projector
    sharding: NamedSharding | None  # of the leaf, under an Explicit mesh
    meshed: bool  # the program may be split over devices

    def decode(self, projector: Projector, other: jax.Array) -> jax.Array:
        """The basis as an array, for a product with `other` and no longer."""
        if not isinstance(self.storage, Floating):
            # Or XLA would decode every projector of the tree as soon as it can, once
            # for both project and lift, and hold them all in between.
            projector = after(projector, other)
        return self.storage.decode(projector, self.shape, other.dtype)

    @property
    def batch(self) -> int:
        """How many batch axes come first."""
        return len(self.shape) - len(self.side.axes) - 1


def _product(
    matrix: Matrix, side: Side, sharding: NamedSharding | None, meshed: bool
) -> _Product:
    shape = matrix.projector_shape(side)
    return _Product(side, matrix.storage, shape, sharding, meshed)


# Compiled by themselves so that a tree's leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnums=0)
def _project(product: _Product, projector: Projector, gradient: jax.Array) -> jax.Array:
    basis = product.decode(projector, gradient)
    if max(product.side.axes) < gradient.ndim - 1 and not product.meshed:
        basis = rank_first(basis, product.batch)
    return _contract(product.side.project, basis, gradient, product.sharding)


@functools.partial(jax.jit, static_argnums=0)
def _lift(product: _Product, projector: Projector, update: jax.Array) -> jax.Array:
    basis = product.decode(projector, update)
    return _contract(product.side.lift, basis, update, product.sharding)


def _contract(
    equation: str, projector: jax.Array, other: jax.Array, leaf: NamedSharding | None
) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(projector.dtype, other.dtype)
    operands, result = equation.split("->")
    basis = letter_sharding(leaf, operands.split(",")[0]) if leaf else None
    return jnp.einsum(
        equation,
        place(projector, basis).astype(dtype),
        other.astype(dtype),
        preferred_element_type=accumulation_dtype(projector, other),
        out_sharding=letter_sharding(leaf, result),
    )


def turned(
    matrix: Matrix,
    new: Sequence[Projector],
    old: Sequence[Projector],
    value: jax.Array,
    of: Callable[[jax.Array], jax.Array] = lambda q: q,
) -> jax.Array:
    """`of(P_newᵀ P_old)` times an array in coordinates, on every projected side."""
    low = matrix.coordinate_letters
    for side, *pair in zip(matrix.sides, new, old, strict=True):
        letters, shape = side.project.split(",")[0], matrix.projector_shape(side)
        rank, square = letters[-1], f"{letters[: len(matrix.batch)]}{letters[-1]}X"
        bases = [matrix.storage.decode(x, shape, value.dtype) for x in pair]
        q = _exactly(f"{letters},{letters[:-1]}X->{square}", *bases)
        value = _exactly(f"{square},{low.replace(rank, 'X')}->{low}", of(q), value)
    return value


def _exactly(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST)


def initial_projector(matrix: Matrix, side: Side, leaf: Any) -> Projector:
    """Orthonormal from the start: a slice of the identity for every matrix."""
    shape = matrix.projector_shape(side)[len(matrix.batch) :]
    one = matrix.storage.initial(shape, leaf.dtype)

    def stack(x: jax.Array) -> jax.Array:
        stacked = jnp.broadcast_to(x, (*matrix.batch_shape, *x.shape))
        owned = jnp.array(stacked)  # a buffer of its own
        return place(owned, replicated(leaf_sharding(leaf)))

    return jax.tree.map(stack, one)


def zero_coordinates(matrix: Matrix, leaf: Any, dtype: jnp.dtype) -> jax.Array:
    """Zeros shaped and sharded as `project` would shape and shard this leaf."""
    zeros = jnp.zeros(matrix.coordinate_shape, dtype)
    return place(zeros, letter_sharding(leaf_sharding(leaf), matrix.coordinate_letters))
