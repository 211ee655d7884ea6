# SPDX-License-Identifier: Apache-2.0
"""Where each kind of array lies, from where the leaf that it belongs to lies.

batch axes              as those of the leaf
rank axes               never split
kept axes of R          as those of the leaf, and over the mesh axes that split its
                        projected ones, which R has not
projected axes of P     as those of the leaf, and over the mesh axes that split its kept
                        ones, which P has not
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from galore_optax._selection.matrices import Matrix, Side
from galore_optax._storage.projectors import Floating
from galore_optax._xla.sharding import Names, fitting, made_of, names_of, shards
from galore_optax.codes import Quantized

# One NamedSharding, or as many as a coded projector has arrays.
Stored: TypeAlias = Any


def whole(mesh: Any) -> NamedSharding:
    """The same on every device."""
    return made_of(mesh, ())


def moment(
    leaf: NamedSharding, shape: tuple[int, ...], spread: Names = ()
) -> NamedSharding:
    """An array like an unprojected leaf, over the axes `spread` besides."""
    names = names_of(leaf, len(shape))
    added = _with(leaf.mesh, names, _unused(spread, names), shape, range(len(shape)))
    return made_of(leaf.mesh, added)


def coordinates(
    matrix: Matrix, leaf: NamedSharding, spread: Names = ()
) -> NamedSharding:
    """An array like the coordinates of a leaf."""
    of_leaf = names_of(leaf, len(matrix.shape))
    axis_of = {letter: axis for axis, letter in enumerate(matrix.leaf_letters)}
    axes = [axis_of.get(letter) for letter in matrix.coordinate_letters]
    names = [() if axis is None else of_leaf[axis] for axis in axes]
    splittable = [place for place, axis in enumerate(axes) if axis is not None]
    order = sorted(splittable, key=lambda place: axes[place] in matrix.batch)
    free = [x for side in matrix.sides for axis in side.axes for x in of_leaf[axis]]
    free += _unused(spread, of_leaf)
    shape = matrix.coordinate_shape
    return made_of(leaf.mesh, _with(leaf.mesh, names, free, shape, order))


def coded(array: NamedSharding, codes: Any, scales: Any) -> Any:
    """Codes and scales of a moment that would lie as `array` does.

    Codes have its axes and lie like it. Scales have them too, one entry a block, and
    are split as far as whole blocks fall on every device; those of a code whose blocks
    run across axes are whole on every device.
    """
    mesh, names = array.mesh, names_of(array, len(codes.shape))
    if len(scales.shape) != len(codes.shape):
        return _quantized(array, whole(mesh))
    axes = zip(names, codes.shape, scales.shape, strict=True)
    of_scales = made_of(mesh, [_blockwise(mesh, *axis) for axis in axes])
    return _quantized(array, of_scales)


def _quantized(codes: Any, scales: Any) -> Any:
    return Quantized(codes, scales)


def _blockwise(mesh: Any, names: Names, entries: int, blocks: int) -> Names:
    found = fitting(mesh, names, blocks)
    parts = shards(mesh, found)
    # Where the last block is shorter, there is one in each of 2ⁿ parts.
    whole_blocks = entries % blocks == 0 or parts & (parts - 1) == 0
    return found if whole_blocks else ()


def stored(
    matrix: Matrix, side: Side, leaf: NamedSharding, spread: Names = ()
) -> Stored:
    """A projector in the state."""
    of_leaf = names_of(leaf, len(matrix.shape))
    batch = [of_leaf[axis] for axis in matrix.batch]
    projected = [of_leaf[axis] for axis in side.axes]
    free = [name for axis in side.others for name in of_leaf[axis]]
    free += _unused(spread, of_leaf)
    shape = matrix.projector_shape(side)[:-1]
    if isinstance(matrix.storage, Floating):
        return _split(leaf.mesh, batch, projected, free, shape)
    # Its projected axes are one, of entries or of blocks.
    free = [name for names in projected for name in names] + free
    return jax.tree.map(
        lambda x: _split(leaf.mesh, batch, [()], free, (*matrix.batch_shape, len(x))),
        _coded_form(matrix, side),
    )


def used(matrix: Matrix, side: Side, leaf: NamedSharding) -> Stored:
    """A projector beside a product: as far apart as the leaf itself is.

    Blocks of codes may lie across shards of the leaf, so that coded ones are whole but
    for batch axes; they are small.
    """
    of_leaf = names_of(leaf, len(matrix.shape))
    batch = [of_leaf[axis] for axis in matrix.batch]
    if isinstance(matrix.storage, Floating):
        projected = [of_leaf[axis] for axis in side.axes]
        return made_of(leaf.mesh, [*batch, *projected])
    return jax.tree.map(lambda _: made_of(leaf.mesh, batch), _coded_form(matrix, side))


def _coded_form(matrix: Matrix, side: Side) -> Any:
    """The arrays of one coded projector, as shapes."""
    shape = matrix.projector_shape(side)[len(matrix.batch) :]
    storage, dtype = matrix.storage, jnp.dtype(jnp.float32)
    return jax.eval_shape(lambda: storage.initial(shape, dtype))


def _split(
    mesh: Any,
    batch: Sequence[Names],
    projected: Sequence[Names],
    free: Iterable[str],
    shape: tuple[int, ...],
) -> NamedSharding:
    """Over free mesh axes besides: a projected axis if one divides, else a batch axis.

    Batch axes come first and are tried last: on the other axis every device has a part
    of each matrix, whichever of them a step is about.
    """
    names, first = [*batch, *projected], len(batch)
    order = [*range(first, len(shape)), *range(first)]
    return made_of(mesh, _with(mesh, names, free, shape, order))


def _with(
    mesh: Any,
    names: Sequence[Names],
    free: Iterable[str],
    shape: tuple[int, ...],
    order: Iterable[int],
) -> list[Names]:
    """`names`, each free mesh axis added to the first array axis that it divides."""
    result, axes = list(names), list(order)
    for name in free:
        for axis in axes:
            both = (*result[axis], name)
            if shape[axis] % shards(mesh, both) == 0:
                result[axis] = both
                break
    return result


def _unused(spread: Names, of_leaf: Sequence[Names]) -> Names:
    used = {name for names in of_leaf for name in names}
    return tuple(name for name in spread if name not in used)
