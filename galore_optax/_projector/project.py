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
        product = _product(matrix, side, sharding, on_mesh(gradient))
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
) -> jax.Array:
    """`P U`, of the shape of the leaf, which lies by `sharding`."""
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
    sharding: NamedSharding | None  # of the leaf, where it is known
    # Of the projector during the product, likewise: gathered from all devices.
    gathered: rules.Stored | None
    low: NamedSharding | None  # of the coordinates, if not as the leaf's axes are
    meshed: bool  # the program may be split over devices

    def decode(self, projector: Projector, other: jax.Array) -> jax.Array:
        """The basis as an array, for a product with `other` and no longer."""
        if self.gathered is not None or not isinstance(self.storage, Floating):
            # Or XLA would gather and decode every projector of the tree as soon as it
            # can, once for both project and lift, and hold them all in between.
            projector = after(projector, other)
        if self.gathered is not None:
            projector = jax.tree.map(place, projector, self.gathered)
        return self.storage.decode(projector, self.shape, other.dtype)

    @property
    def batch(self) -> int:
        """How many batch axes come first."""
        return len(self.shape) - len(self.side.axes) - 1


def _product(
    matrix: Matrix, side: Side, sharding: NamedSharding | None, meshed: bool
) -> _Product:
    shape = matrix.projector_shape(side)
    gathered = sharding and rules.used(matrix, side, sharding)
    return _Product(side, matrix.storage, shape, sharding, gathered, None, meshed)


# Compiled by themselves so that a tree's leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnums=0)
def _project(product: _Product, projector: Projector, gradient: jax.Array) -> jax.Array:
    basis = product.decode(projector, gradient)
    if max(product.side.axes) < gradient.ndim - 1 and not product.meshed:
        basis = rank_first(basis, product.batch)
    return _contract(
        product.side.project, basis, gradient, product.sharding, product.low
    )


@functools.partial(jax.jit, static_argnums=0)
def _lift(product: _Product, projector: Projector, update: jax.Array) -> jax.Array:
    basis = product.decode(projector, update)
    return _contract(product.side.lift, basis, update, product.sharding)


def _contract(
    equation: str,
    projector: jax.Array,
    other: jax.Array,
    leaf: NamedSharding | None,
    result_lies: NamedSharding | None = None,
) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):
        dtype = jnp.promote_types(projector.dtype, other.dtype)
    operands, result = equation.split("->")
    basis, factor = (letter_sharding(leaf, x) for x in operands.split(","))
    wanted = result_lies or letter_sharding(leaf, result)
    explicit = leaf is not None and is_explicit(leaf)
    product = jnp.einsum(
        equation,
        place(projector, basis).astype(dtype),
        place(other, factor).astype(dtype),
        preferred_element_type=accumulation_dtype(projector, other),
        out_sharding=wanted if explicit else None,
    )
    return product if explicit else place(product, wanted)


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
