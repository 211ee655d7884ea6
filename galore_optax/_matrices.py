# SPDX-License-Identifier: Apache-2.0
"""The static plan: which leaves are projected, on which side, with which rank.

Decided from paths, shapes and dtypes alone, once per trace, and frozen. Whatever runs
under `jit` reads its axes from here and never infers them from an array, which may be
square.
"""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from galore_optax._dimensions import WeightDimensionNumbers, resolve, unsuitable
from galore_optax._layout import Axes
from galore_optax._leaves import Flat, flatten
from galore_optax._stored import Storage
from galore_optax._types import PerLeaf, ProjType, Scalar

PROJ_TYPES: tuple[str, ...] = get_args(ProjType)


class Leaf(NamedTuple):
    """What a callable `rank`, `update_proj_gap` or `scale` is told about a leaf."""

    path: str
    shape: tuple[int, ...]
    rows: int  # output size of the linear map
    cols: int  # input size
    batch: tuple[int, ...]  # sizes of the batch axes, () for a single matrix


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


@dataclasses.dataclass(frozen=True)
class Plan:
    """What becomes of every leaf of a tree; `None` in `matrices` is full size."""

    flat: Flat
    matrices: tuple[Matrix | None, ...]
    reasons: tuple[str, ...]

    @property
    def projected(self) -> tuple[Matrix, ...]:
        return tuple(matrix for matrix in self.matrices if matrix is not None)

    def without_values(self) -> "Plan":
        """The plan alone, holding on to no array and no tracer."""
        flat = dataclasses.replace(self.flat, nodes=())
        return dataclasses.replace(self, flat=flat)

    @property
    def is_full(self) -> list[bool]:
        return [matrix is None for matrix in self.matrices]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The user's choice of leaves, ranks, gaps, scales, sides and storage."""

    rank: PerLeaf[int]
    update_proj_gap: PerLeaf[Scalar]
    scale: PerLeaf[Scalar]
    proj_type: ProjType
    weight_dimension_numbers: WeightDimensionNumbers
    storage: Storage

    def __post_init__(self) -> None:
        if self.proj_type not in PROJ_TYPES:
            raise ValueError(
                f"proj_type={self.proj_type!r} is unknown. Choose one of"
                f" {', '.join(map(repr, PROJ_TYPES))}."
            )
        if not callable(self.rank):
            check_rank(self.rank)
        if not callable(self.update_proj_gap):
            check_gap(self.update_proj_gap)
        if not callable(self.scale):
            check_scale(self.scale)

    def plan(self, params: Any) -> Plan:
        """Decides every leaf of `params`, which may be abstract."""
        flat = flatten(params)
        verdicts = resolve(self.weight_dimension_numbers, params)
        matrices = tuple(
            self._matrix(
                position, path, value, verdicts[path].axes, verdicts[path].reason
            )
            for position, (path, value) in enumerate(
                zip(flat.paths, flat.values, strict=True)
            )
        )
        reasons = tuple(verdicts[path].reason for path in flat.paths)
        plan = Plan(flat, matrices, reasons)
        if not plan.projected:
            raise ValueError(_nothing_projected(plan))
        return plan

    def _matrix(
        self, position: int, path: str, value: Any, axes: Axes | None, reason: str
    ) -> Matrix | None:
        if axes is None:
            return None
        shape = tuple(value.shape)
        _check_leaf(path, value)
        batch = tuple(
            axis for axis in range(len(shape)) if axis not in (*axes.rows, *axes.cols)
        )
        leaf = _leaf(path, shape, axes, batch)
        return Matrix(
            path=path,
            position=position,
            shape=shape,
            rows=axes.rows,
            cols=axes.cols,
            batch=batch,
            sides=_sides(self.proj_type, leaf, axes, batch),
            rank=min(check_rank(_at(self.rank, leaf), path), leaf.rows, leaf.cols),
            gap=check_gap(_at(self.update_proj_gap, leaf), path),
            scale=check_scale(_at(self.scale, leaf), path),
            storage=self.storage,
            reason=reason,
        )


def _leaf(
    path: str, shape: tuple[int, ...], axes: Axes, batch: tuple[int, ...]
) -> Leaf:
    rows = math.prod(shape[axis] for axis in axes.rows)
    cols = math.prod(shape[axis] for axis in axes.cols)
    return Leaf(path, shape, rows, cols, tuple(shape[axis] for axis in batch))


def _at(value: Any, leaf: Leaf) -> Any:
    return value(leaf) if callable(value) else value


def _sides(
    proj_type: str, leaf: Leaf, axes: Axes, batch: tuple[int, ...]
) -> tuple[Side, ...]:
    tall = leaf.rows >= leaf.cols  # square counts as tall, as in the reference
    left, right = (axes.rows, axes.cols), (axes.cols, axes.rows)
    chosen = {
        "std": (right if tall else left,),
        "reverse_std": (left if tall else right,),
        "left": (left,),
        "right": (right,),
        "full": (left, right),
    }[proj_type]
    letters = [chr(ord("a") + axis) for axis in range(len(leaf.shape))]
    sides = []
    for (projected, others), rank_letter in zip(chosen, "YZ", strict=False):
        side, letters = _side(projected, others, batch, letters, rank_letter)
        sides.append(side)
    return tuple(sides)


def _side(
    projected: tuple[int, ...],
    others: tuple[int, ...],
    batch: tuple[int, ...],
    letters: list[str],
    rank_letter: str,
) -> tuple[Side, list[str]]:
    names = [chr(ord("a") + axis) for axis in (*batch, *projected)]
    gone = names[len(batch) :]
    after = [rank_letter if x == gone[0] else x for x in letters if x not in gone[1:]]
    full, low, basis = "".join(letters), "".join(after), "".join(names) + rank_letter
    side = Side(projected, others, f"{basis},{full}->{low}", f"{basis},{low}->{full}")
    return side, after


def _where(path: str) -> str:
    return f" of '{path}'" if path else ""


def check_rank(rank: Any, path: str = "") -> int:
    """`rank` as an int, or an error that says what to write."""
    if isinstance(rank, jax.core.Tracer):
        raise TypeError(
            f"rank{_where(path)} is traced, but it decides shapes and must be a Python"
            " int. Under optax.inject_hyperparams write"
            " inject_hyperparams(..., static_args=galore_optax.STATIC_ARGS)."
        )
    return _positive_int("rank", rank, path)


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
            f"scale{_where(path)} is {scale!r}; it must be a number or a callable of"
            " one galore_optax.Leaf. A schedule goes through optax.inject_hyperparams."
        )
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(
            f"scale={scale!r}{_where(path)} must be positive and finite; the reference"
            " uses 0.25. To freeze a leaf use optax.partition with optax.set_to_zero()."
        )
    return float(scale)


def _is_scalar_array(value: Any, kind: Any) -> bool:
    return (
        isinstance(value, jax.Array)
        and value.ndim == 0
        and jnp.issubdtype(value.dtype, kind)
    )


def _positive_int(name: str, value: Any, path: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or number < 1:
        raise ValueError(
            f"{name}={value!r}{_where(path)} must be a positive int, or a callable of"
            " one galore_optax.Leaf that returns one."
        )
    return number


def _check_leaf(path: str, value: Any) -> None:
    reason = unsuitable(value)
    if reason:
        raise ValueError(
            f"'{path}', {value.dtype}{list(value.shape)}, is selected for projection"
            f" but has {reason}; only real floating-point leaves with entries can be"
            " projected. Give it None in weight_dimension_numbers, or keep it out with"
            " optax.masked."
        )


def _nothing_projected(plan: Plan) -> str:
    leaves = [
        f"'{path}' {tuple(value.shape)}: {reason}"
        for path, value, reason in zip(
            plan.flat.paths, plan.flat.values, plan.reasons, strict=True
        )
    ]
    shown = "; ".join(leaves[:8]) + ("; ..." if len(leaves) > 8 else "")
    return (
        "galore projects no leaf of this tree, so it would save nothing. The leaves"
        f" are: {shown or 'none'}. Name axes with weight_dimension_numbers=, or use the"
        " inner optimizer alone."
    )


def same_leaves(plan: Plan, other: Flat, name: str) -> None:
    """Raises unless `other` has the leaves of `plan`, path by path."""
    if plan.flat.paths == other.paths:
        return
    ours, theirs = set(plan.flat.paths), set(other.paths)
    raise ValueError(
        f"updates and {name} are different trees: only updates have"
        f" {_few(ours - theirs)}; only {name} have {_few(theirs - ours)}. Pass the"
        " gradients of the parameters that the optimizer was initialised with."
    )


def _few(paths: Sequence[str] | set[str]) -> str:
    return ", ".join(repr(path) for path in sorted(paths)[:4]) or "nothing"
