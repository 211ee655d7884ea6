# SPDX-License-Identifier: Apache-2.0
"""The static plan: which leaves are projected, on which side, with which rank.

Decided from paths, shapes and dtypes alone, once per trace, and frozen. Whatever runs
under `jit` reads its axes from here and never infers them from an array, which may be
square.
"""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from galore_optax._selection.leaves import Flat
from galore_optax._storage.projectors import Storage
from galore_optax._types import Scalar


@dataclasses.dataclass(frozen=True)
class Side:
    """One projected group of axes and the `einsum` equations that go with it."""

    axes: tuple[int, ...]  # of the leaf, replaced by one rank axis
    others: tuple[int, ...]  # of the leaf, the opposite side of the matrix
    project: str  # "projector,gradient->projected"
    lift: str  # "projector,projected->gradient"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A projected leaf: a batch of matrices of one size."""

    path: str
    position: int  # among the leaves of the tree
    shape: tuple[int, ...]
    rows: tuple[int, ...]  # output axes
    cols: tuple[int, ...]  # input axes
    batch: tuple[int, ...]  # all other axes
    sides: tuple[Side, ...]  # one, or two for proj_type "full"
    rank: int
    gap: Scalar  # steps between refreshes
    scale: Scalar
    storage: Storage  # of its projectors
    reason: str
    number: int  # of its first matrix among those of the whole tree
    sliced: bool  # one layer of a leaf that has more

    def size(self, axes: tuple[int, ...]) -> int:
        return math.prod(self.shape[axis] for axis in axes)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.batch)

    @property
    def count(self) -> int:
        """How many matrices the leaf holds."""
        return math.prod(self.batch_shape)

    @property
    def leaf_letters(self) -> str:
        """The axes of the leaf in the `einsum` equations of its sides."""
        return self.sides[0].project.split("->")[0].split(",")[1]

    @property
    def coordinate_letters(self) -> str:
        """The axes of the projected leaf, rank axes capital."""
        return self.sides[-1].project.split("->")[1]

    @property
    def coordinate_shape(self) -> tuple[int, ...]:
        sizes = dict(zip(self.leaf_letters, self.shape, strict=True))
        return tuple(sizes.get(x, self.rank) for x in self.coordinate_letters)

    def projector_shape(self, side: Side) -> tuple[int, ...]:
        sizes = tuple(self.shape[axis] for axis in side.axes)
        return (*self.batch_shape, *sizes, self.rank)


class Reached(NamedTuple):
    """A leaf whose rank is no smaller than one of its dimensions."""

    path: str
    rank: int  # as asked for
    dimension: int  # the smaller one of its matrices
    whole: bool  # kept at full size for it; else the rank is clipped


class Numbering(NamedTuple):
    """Which matrices of the whole tree are at hand."""

    numbers: Any  # (matrices,), int
    total: int  # in the whole tree


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of every leaf of a tree; `None` in `matrices` is full size."""

    flat: Flat
    matrices: tuple[Matrix | None, ...]
    reasons: tuple[str, ...]
    total: int  # matrices in the whole tree
    layer: Any = None  # int32 scalar where leaves are sliced
    reached: tuple[Reached, ...] = ()

    @property
    def projected(self) -> tuple[Matrix, ...]:
        return tuple(matrix for matrix in self.matrices if matrix is not None)

    def pairs(self) -> list[tuple[Matrix, Any]]:
        """Each projected leaf with its values."""
        values = self.flat.values
        return [(matrix, values[matrix.position]) for matrix in self.projected]

    def abstract(self) -> "Plan":
        """The plan with shapes for values, holding on to no array and no tracer."""
        return self.with_values(jax.tree.map(_shape, self.flat.nodes))

    def with_values(self, nodes: tuple[Any, ...]) -> "Plan":
        """The plan for other arrays of the same shapes."""
        flat = dataclasses.replace(self.flat, nodes=nodes)
        return dataclasses.replace(self, flat=flat)

    @property
    def is_full(self) -> list[bool]:
        return [matrix is None for matrix in self.matrices]

    @property
    def ndims(self) -> list[int]:
        """How many axes each leaf has for the inner."""
        leaves = zip(self.matrices, self.flat.values, strict=True)
        return [len(m.coordinate_shape) if m else x.ndim for m, x in leaves]

    @property
    def counts(self) -> list[int]:
        """How many matrices each projected leaf holds."""
        return [matrix.count for matrix in self.projected]

    def arrange(self, values: Iterable[Any]) -> Any:
        """`values`, one a projected leaf, as a tree like params."""
        nodes: list[Any] = [optax.MaskedNode()] * len(self.matrices)
        for matrix, value in zip(self.projected, values, strict=True):
            nodes[matrix.position] = value
        return self.flat.treedef.unflatten(nodes)

    def read(self, tree: Any) -> list[Any]:
        """What a tree like params holds for each projected leaf."""
        nodes = self.flat.subtrees(tree)
        return [nodes[matrix.position] for matrix in self.projected]

    @property
    def numbering(self) -> Numbering:
        """In the order of the whole tree, and row-major within a leaf."""
        starts = [matrix.number for matrix in self.projected]
        return Numbering(self._count_from(starts, np.int32), self.total)

    @property
    def names(self) -> Any:
        """(matrices,), uint32: of each matrix by path and index, whatever else is."""
        starts = [zlib.crc32(matrix.path.encode()) for matrix in self.projected]
        return self._count_from(starts, np.uint32)

    def _count_from(self, starts: Sequence[int], dtype: Any) -> Any:
        found = [
            np.array(start, dtype) + self._index(matrix).astype(dtype)
            for start, matrix in zip(starts, self.projected, strict=True)
        ]
        traced = any(isinstance(each, jax.Array) for each in found)
        return (jnp if traced else np).concatenate(found)

    def _index(self, matrix: Matrix) -> Any:
        """(count,): of each matrix among those of its leaf in the whole tree."""
        index = np.arange(matrix.count, dtype=np.int32)
        return index + self.layer * matrix.count if matrix.sliced else index


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def same_leaves(plan: Plan, other: Flat, name: str) -> None:
    """Raises unless `other` has the leaves of `plan`, path by path."""
    if plan.flat.paths == other.paths:
        return
    ours, theirs = set(plan.flat.paths), set(other.paths)
    lacks = [
        f"{which} lack {few(paths)}"
        for which, paths in (("updates", theirs - ours), (name, ours - theirs))
        if paths
    ]
    raise ValueError(
        f"updates and {name} are different trees:"
        f" {'; '.join(lacks) or 'their leaves come in another order'}. Pass the"
        " gradients of the parameters that the optimizer was initialised with."
    )


def few(paths: Iterable[str]) -> str:
    return ", ".join(repr(path) for path in sorted(paths)[:4]) or "nothing"
