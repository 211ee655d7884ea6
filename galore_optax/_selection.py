# SPDX-License-Identifier: Apache-2.0
"""The user's choice of matrices, and the plan that it makes of a tree."""

import dataclasses
import math
from typing import Any, NamedTuple, get_args

from galore_optax._arguments import check_gap, check_rank, check_scale
from galore_optax._dimensions import WeightDimensionNumbers, resolve, unsuitable
from galore_optax._layout import Axes, Verdict
from galore_optax._leaves import flatten
from galore_optax._matrices import Matrix, Plan, Side, few
from galore_optax._types import PerLeaf, ProjType, Scalar
from galore_optax._whole import current

PROJ_TYPES: tuple[str, ...] = get_args(ProjType)


class Leaf(NamedTuple):
    """What a callable `rank`, `update_proj_gap` or `scale` is told about a leaf."""

    path: str
    shape: tuple[int, ...]
    rows: int  # output size of the linear map
    cols: int  # input size
    batch: tuple[int, ...]  # sizes of the batch axes, () for a single matrix


class _Place(NamedTuple):
    """A leaf of the whole tree."""

    shape: tuple[int, ...]
    axes: Axes | None
    reason: str
    number: int  # of its first matrix

    @property
    def batch(self) -> tuple[int, ...]:
        return _batch(self.shape, self.axes) if self.axes else ()

    @property
    def matrices(self) -> int:
        """How many it holds; 0 where nothing is projected."""
        sizes = (self.shape[axis] for axis in self.batch)
        return math.prod(sizes) if self.axes else 0

    def without_layers(self, path: str) -> Axes | None:
        """The axes of one layer."""
        if self.axes is None:
            return None
        if 0 not in self.batch:
            raise ValueError(
                f"'{path}' of shape {self.shape} is a stack of layers, but its first"
                " axis is taken for one of the matrix. Name the other axes with"
                " weight_dimension_numbers."
            )
        shift = [tuple(axis - 1 for axis in axes) for axes in self.axes.both]
        return Axes(*shift)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The user's choice of leaves, ranks, gaps, scales and sides."""

    rank: PerLeaf[int]
    update_proj_gap: PerLeaf[Scalar]
    scale: PerLeaf[Scalar]
    proj_type: ProjType
    weight_dimension_numbers: WeightDimensionNumbers

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
        flat, whole = flatten(params), current()
        places = self._places(params if whole is None else whole.params)
        matrices = tuple(
            self._matrix(position, path, value, _find(places, path))
            for position, (path, value) in enumerate(
                zip(flat.paths, flat.values, strict=True)
            )
        )
        reasons = tuple(places[path].reason for path in flat.paths)
        total = sum(place.matrices for place in places.values())
        plan = Plan(flat, matrices, reasons, total, whole and whole.layer)
        if not total:
            raise ValueError(_nothing_projected(plan))
        return plan

    def _places(self, params: Any) -> dict[str, _Place]:
        flat, number = flatten(params), 0
        verdicts = resolve(self.weight_dimension_numbers, params)
        places = {}
        for path, value in zip(flat.paths, flat.values, strict=True):
            place = _Place(tuple(value.shape), *_both(verdicts[path]), number)
            places[path] = place
            number += place.matrices
        return places

    def _matrix(
        self, position: int, path: str, value: Any, place: _Place
    ) -> Matrix | None:
        shape = tuple(value.shape)
        sliced = shape == place.shape[1:]
        axes = place.without_layers(path) if sliced else place.axes
        if axes is None or place.axes is None:
            return None
        _check_leaf(path, value)
        leaf = _leaf(path, place, place.axes)
        batch = _batch(shape, axes)
        return Matrix(
            path=path,
            position=position,
            shape=shape,
            rows=axes.rows,
            cols=axes.cols,
            batch=batch,
            sides=_sides(self.proj_type, leaf.rows >= leaf.cols, axes, batch),
            rank=min(check_rank(_at(self.rank, leaf), path), leaf.rows, leaf.cols),
            gap=check_gap(_at(self.update_proj_gap, leaf), path),
            scale=check_scale(_at(self.scale, leaf), path),
            reason=place.reason,
            number=place.number,
            sliced=sliced,
        )


def _both(verdict: Verdict) -> tuple[Axes | None, str]:
    return verdict.axes, verdict.reason


def _find(places: dict[str, _Place], path: str) -> _Place:
    if path not in places:
        raise ValueError(
            f"'{path}' is no leaf of the parameters that are trained layer by layer:"
            f" these have {few(places.keys())}. A transformation must keep the names"
            " of the leaves it hands on."
        )
    return places[path]


def _batch(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    named = (*axes.rows, *axes.cols)
    return tuple(axis for axis in range(len(shape)) if axis not in named)


def _leaf(path: str, place: _Place, axes: Axes) -> Leaf:
    def sizes(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(place.shape[axis] for axis in axes)

    rows, cols = map(math.prod, map(sizes, axes.both))
    return Leaf(path, place.shape, rows, cols, sizes(place.batch))


def _at(value: Any, leaf: Leaf) -> Any:
    return value(leaf) if callable(value) else value


def _sides(
    proj_type: str,
    tall: bool,  # square counts as tall, as in the reference
    axes: Axes,
    batch: tuple[int, ...],
) -> tuple[Side, ...]:
    left, right = (axes.rows, axes.cols), (axes.cols, axes.rows)
    chosen = {
        "std": (right if tall else left,),
        "reverse_std": (left if tall else right,),
        "left": (left,),
        "right": (right,),
        "full": (left, right),
    }[proj_type]
    axis_count = len((*axes.rows, *axes.cols, *batch))
    letters = [chr(ord("a") + axis) for axis in range(axis_count)]
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
