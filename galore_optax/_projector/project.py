# SPDX-License-Identifier: Apache-2.0
"""Project and lift: `R = PᵀG` and `P U`, for batches of matrices.

    leaf          batch axes, rows and columns in whichever order its layer has them
    projector     (*batch, projected axes..., rank), "abR" of a side's equation
    coordinates   the leaf's axes, those projected replaced by one of the rank

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

from galore_optax._context import current
from galore_optax._placing import rules
from galore_optax._placing.declared import spread
from galore_optax._projector.slices import Multiply, Slices, slices_of
from galore_optax._selection.matrices import Matrix, Side
from galore_optax._storage.projectors import Floating, Projector, Storage
from galore_optax._xla.order import after, rank_first
from galore_optax._xla.sharding import (
    everywhere,
    is_explicit,
    leaf_sharding,
    letter_sharding,
    on_mesh,
    place,
    replicated,
    sharding_of,
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
    sharding = sharding_of(matrix.path, gradient)
    for side, projector in zip(matrix.sides, projectors, strict=True):
        product = _product(matrix, side, sharding, gradient)
        if sharding and side is matrix.sides[-1]:
            lying = rules.coordinates(matrix, sharding, spread())
            product = dataclasses.replace(product, low=lying)
        gradient = _project(product, projector, gradient)
    return gradient


def lift(
    matrix: Matrix,
    projectors: Sequence[Projector],
    update: jax.Array,
    sharding: NamedSharding | None,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """`P U`, of the leaf's shape, which lies by `sharding`, in `dtype` if given."""
    pairs = list(zip(matrix.sides, projectors, strict=True))
    for side, projector in reversed(pairs):
        product = _product(matrix, side, sharding, update)
        if side is matrix.sides[0]:
            product = dataclasses.replace(product, dtype=dtype)
        update = _lift(product, projector, update)
    return update


@dataclasses.dataclass(frozen=True)
class _Product:
    """All that is static of a product with one projector."""

    side: Side
    storage: Storage
    shape: tuple[int, ...]  # of the projector
    sharding: NamedSharding | None  # of the leaf, where it is known
    # Of the projector during the product, likewise: gathered from all devices.
    gathered: rules.Stored | None
    slices: Slices | None  # if not all of a stack is to be gathered at once
    meshed: bool  # the program may be split over devices
    low: NamedSharding | None = None  # of the coordinates, if not as the leaf's axes
    dtype: jnp.dtype | None = None  # of the result, if not that of its sums

    def decode(self, projector: Projector, other: jax.Array) -> jax.Array:
        """The basis as an array, for a product with `other` and no longer."""
        if self.gathered is not None or not isinstance(self.storage, Floating):
            # Or XLA would gather and decode every projector of the tree as soon as it
            # can, once for both project and lift, and hold them all in between.
            projector = after(projector, other)
        if self.gathered is not None:
            projector = jax.tree.map(place, projector, self.gathered)
        # Of as many matrices as there are: a slice has fewer.
        batch = jax.tree.leaves(projector)[0].shape[: self.batch]
        shape = (*batch, *self.shape[self.batch :])
        return self.storage.decode(projector, shape, other.dtype)

    def result_lies(self, equation: str) -> NamedSharding | None:
        return self.low or letter_sharding(self.sharding, equation.split("->")[1])

    @property
    def batch(self) -> int:
        """How many batch axes come first."""
        return len(self.shape) - len(self.side.axes) - 1


def _product(
    matrix: Matrix, side: Side, sharding: NamedSharding | None, other: jax.Array
) -> _Product:
    shape, gathered, slices = matrix.projector_shape(side), None, None
    if sharding is not None:
        gathered = rules.used(matrix, side, sharding)
        slices = slices_of(matrix, side, sharding, other.dtype)
    return _Product(
        side, matrix.storage, shape, sharding, gathered, slices, on_mesh(other)
    )


# Compiled by themselves so that a tree's leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnums=0)
def _project(product: _Product, projector: Projector, gradient: jax.Array) -> jax.Array:
    def multiply(projector: Projector, gradient: jax.Array) -> jax.Array:
        basis = product.decode(projector, gradient)
        if max(product.side.axes) < gradient.ndim - 1 and not product.meshed:
            basis = rank_first(basis, product.batch)
        return _contract(product, product.side.project, basis, gradient)

    return _multiplied(product, product.side.project, multiply, (projector, gradient))


@functools.partial(jax.jit, static_argnums=0)
def _lift(product: _Product, projector: Projector, update: jax.Array) -> jax.Array:
    def multiply(projector: Projector, update: jax.Array) -> jax.Array:
        basis = product.decode(projector, update)
        return _contract(product, product.side.lift, basis, update)

    return _multiplied(product, product.side.lift, multiply, (projector, update))


def _multiplied(
    product: _Product,
    equation: str,
    multiply: Multiply,
    operands: tuple[Projector, jax.Array],
) -> jax.Array:
    if product.slices is None:
        return multiply(*operands)
    return product.slices.multiply(
        equation, multiply, operands, product.result_lies(equation)
    )


def _contract(
    product: _Product, equation: str, projector: jax.Array, other: jax.Array
) -> jax.Array:
    leaf = product.sharding
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(projector.dtype, other.dtype)
    operands = equation.split("->")[0].split(",")
    basis, factor = (letter_sharding(leaf, x) for x in operands)
    wanted = product.result_lies(equation)
    explicit = leaf is not None and is_explicit(leaf)
    found = jnp.einsum(
        equation,
        place(projector, basis).astype(dtype),
        place(other, factor).astype(dtype),
        preferred_element_type=accumulation_dtype(projector, other),
        out_sharding=wanted if explicit else None,
    )
    found = found if explicit else place(found, wanted)
    return found if product.dtype is None else found.astype(product.dtype)


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
        square, q = _between(matrix, side, pair, value.dtype)
        rank = square[-2]
        value = _exactly(f"{square},{low.replace(rank, 'X')}->{low}", of(q), value)
    return value


def overlap(
    matrix: Matrix, new: Sequence[Projector], old: Sequence[Projector]
) -> jax.Array:
    """`|P_newᵀ P_old|² / rank`, in the batch axes; of two sides the smaller one."""
    found = []
    for side, *pair in zip(matrix.sides, new, old, strict=True):
        _, q = _between(matrix, side, pair, jnp.dtype(jnp.float32))
        found.append(jnp.sum(q**2, axis=(-2, -1)) / matrix.rank)
    return functools.reduce(jnp.minimum, found)


def _between(
    matrix: Matrix, side: Side, pair: Sequence[Projector], dtype: jnp.dtype
) -> tuple[str, jax.Array]:
    """The letters of `P_newᵀ P_old`, batch axes first, and itself."""
    letters, shape = side.project.split(",")[0], matrix.projector_shape(side)
    rank, whole = letters[-1], map(everywhere, pair)
    bases = [matrix.storage.decode(x, shape, dtype).astype(dtype) for x in whole]
    square = f"{letters[: len(matrix.batch)]}{rank}X"
    return square, _exactly(f"{letters},{letters[:-1]}X->{square}", *bases)


def _exactly(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST)


def initial_projector(matrix: Matrix, side: Side, leaf: Any) -> Projector:
    """Orthonormal from the start: a slice of the identity for every matrix."""
    shape = matrix.projector_shape(side)[len(matrix.batch) :]
    one = matrix.storage.initial(shape, leaf.dtype)

    def stack(x: jax.Array) -> jax.Array:
        stacked = jnp.broadcast_to(x, (*matrix.batch_shape, *x.shape))
        return jnp.array(stacked)  # a buffer of its own

    stacks, sharding = jax.tree.map(stack, one), _lies(matrix, leaf)
    if sharding is None or not _is_kept(sharding):
        return jax.tree.map(lambda x: place(x, replicated(sharding)), stacks)
    return jax.tree.map(place, stacks, rules.stored(matrix, side, sharding, spread()))


def zero_coordinates(matrix: Matrix, leaf: Any, dtype: jnp.dtype) -> jax.Array:
    """Zeros shaped and sharded as `project` would shape and shard this leaf."""
    zeros = lax.full(matrix.coordinate_shape, 0, dtype)
    sharding = _lies(matrix, leaf)
    if sharding is None or not _is_kept(sharding):
        return place(zeros, letter_sharding(sharding, matrix.coordinate_letters))
    return place(zeros, rules.coordinates(matrix, sharding, spread()))


def _lies(matrix: Matrix, leaf: Any) -> NamedSharding | None:
    """Where a leaf lies, which need not be traced."""
    declared = current().declared
    return sharding_of(matrix.path, leaf) if declared else leaf_sharding(leaf)


def _is_kept(sharding: NamedSharding) -> bool:
    """Whether an update will know it too, and can bring back what is spread wider.

    Elsewhere XLA would lay out the parameters as it finds their state.
    """
    return current().declared is not None or is_explicit(sharding)
