# SPDX-License-Identifier: Apache-2.0
"""The user's choice of matrices, and the plan that it makes of a tree."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, get_args

from galore_optax._arguments import check_gap, check_rank, check_scale, rank_of
from galore_optax._context import current
from galore_optax._selection.dimensions import (
    WeightDimensionNumbers,
    resolve,
    unsuitable,
)
from galore_optax._selection.layout import Axes, Verdict
from galore_optax._selection.leaves import flatten, masked_paths
from galore_optax._selection.matrices import Matrix, Plan, Reached, Side, few
from galore_optax._selection.patterns import Patterns
from galore_optax._storage.projectors import Storage
from galore_optax._types import PerLeaf, ProjType, Scalar

PROJ_TYPES: tuple[str, ...] = get_args(ProjType)
SAVES_NOTHING = "rank saves nothing"


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
    rank: int = 0
    reached: Reached | None = None

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
    """The user's choice of leaves, ranks, gaps, scales, sides and storage."""

    # Dictionaries by pattern as `Patterns`.
    rank: PerLeaf[int | float] | Patterns[int | float]
    update_proj_gap: PerLeaf[Scalar] | Patterns[Scalar]
    scale: PerLeaf[Scalar] | Patterns[Scalar]
    proj_type: ProjType
    weight_dimension_numbers: WeightDimensionNumbers
    storage: Storage

    def __post_init__(self) -> None:
        if self.proj_type not in PROJ_TYPES:
            raise ValueError(
                f"proj_type={self.proj_type!r} is unknown. Choose one of"
                f" {', '.join(map(repr, PROJ_TYPES))}."
            )

    def plan(self, params: Any) -> Plan:
        """Decides every leaf of `params`, which may be abstract."""
        flat, whole = flatten(params), current().whole
        places = self._places(params if whole is None else whole.params)
        matrices = tuple(
            self._matrix(position, path, value, _find(places, path))
            for position, (path, value) in enumerate(flat.items())
        )
        total = sum(place.matrices for place in places.values())
        if not total:
            raise ValueError(_nothing_projected(places))
        return Plan(
            flat,
            matrices,
            tuple(places[path].reason for path in flat.paths),
            total,
            whole and whole.layer,
            _reached(places[path] for path in flat.paths),
        )

    def _places(self, params: Any) -> dict[str, _Place]:
        flat, number = flatten(params), 0
        _check_paths(flat.paths)
        for argument in (self.rank, self.update_proj_gap, self.scale):
            if isinstance(argument, Patterns):
                argument.check_matches((*flat.paths, *masked_paths(params)))
        verdicts = resolve(self.weight_dimension_numbers, params)
        places = {}
        for path, value in flat.items():
            place = self._place(path, value, verdicts[path], number)
            places[path] = place
            number += place.matrices
        return places

    def _place(self, path: str, value: Any, verdict: Verdict, number: int) -> _Place:
        shape, axes = tuple(value.shape), verdict.axes
        if axes is None:
            return _Place(shape, None, verdict.reason, number)
        _check_leaf(path, value)
        leaf = _leaf(path, shape, axes)
        dimension = min(leaf.rows, leaf.cols)
        asked = rank_of(check_rank(_at(self.rank, leaf), path), dimension)
        rank = min(asked, dimension)
        sides = _sides(
            self.proj_type, leaf.rows >= leaf.cols, axes, _batch(shape, axes)
        )
        whole = not verdict.named and not _saves(shape, sides, rank)
        reached = None
        if whole or asked >= dimension:
            reached = Reached(path, asked, dimension, whole)
        if whole:
            return _Place(shape, None, SAVES_NOTHING, number, 0, reached)
        return _Place(shape, axes, verdict.reason, number, rank, reached)

    def _matrix(
        self, position: int, path: str, value: Any, place: _Place
    ) -> Matrix | None:
        shape = tuple(value.shape)
        sliced = shape == place.shape[1:]
        axes = place.without_layers(path) if sliced else place.axes
        if axes is None or place.axes is None:
            return None
        leaf = _leaf(path, place.shape, place.axes)
        batch = _batch(shape, axes)
        return Matrix(
            path=path,
            position=position,
            shape=shape,
            rows=axes.rows,
            cols=axes.cols,
            batch=batch,
            sides=_sides(self.proj_type, leaf.rows >= leaf.cols, axes, batch),
            rank=place.rank,
            gap=check_gap(_at(self.update_proj_gap, leaf), path),
            scale=check_scale(_at(self.scale, leaf), path),
            storage=self.storage,
            reason=place.reason,
            number=place.number,
            sliced=sliced,
        )


def rank_notice(plan: Plan) -> str | None:
    """One line on the leaves whose rank reaches a dimension; `None` without any."""
    if not plan.reached:
        return None
    return (
        f"the rank reaches a dimension of {_name_reached(plan.reached)}. Give galore a"
        " lower rank, or these leaves None in weight_dimension_numbers."
    )


def _name_reached(leaves: Sequence[Reached], most: int = 4) -> str:
    shown = [
        f"'{leaf.path}' (rank {leaf.rank}, dimension {leaf.dimension},"
        f" {'kept at full size' if leaf.whole else 'clipped'})"
        for leaf in sorted(leaves, key=lambda leaf: not leaf.whole)[:most]
    ]
    more = [f"and {len(leaves) - most} more"] if len(leaves) > most else []
    return ", ".join([*shown, *more])


def _reached(places: Iterable[_Place]) -> tuple[Reached, ...]:
    return tuple(place.reached for place in places if place.reached)


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


def _leaf(path: str, shape: tuple[int, ...], axes: Axes) -> Leaf:
    def sizes(axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape[axis] for axis in axes)

    rows, cols = map(math.prod, map(sizes, axes.both))
    return Leaf(path, shape, rows, cols, sizes(_batch(shape, axes)))


def _saves(shape: tuple[int, ...], sides: tuple[Side, ...], rank: int) -> bool:
    """Whether the coordinates of a leaf have fewer entries than it has."""
    projected = {axis for side in sides for axis in side.axes}
    others = (size for axis, size in enumerate(shape) if axis not in projected)
    return math.prod(others) * rank ** len(sides) < math.prod(shape)


def _at(value: Any, leaf: Leaf) -> Any:
    if isinstance(value, Patterns):
        return value.at(leaf.path)
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


def _check_paths(paths: tuple[str, ...]) -> None:
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise ValueError(
            f"two leaves have the path '{twice[0]}', one of them in a key with a slash."
            " Rename that key: leaves are told apart by their paths."
        )


def _nothing_projected(places: dict[str, _Place]) -> str:
    leaves = [
        f"'{path}' {place.shape}: {place.reason}" for path, place in places.items()
    ]
    shown = "; ".join(leaves[:8]) + ("; ..." if len(leaves) > 8 else "")
    reached = _reached(places.values())
    lower = ""
    if reached:
        lower = (
            " Where the rank reaches the smaller dimension, projecting saves nothing:"
            f" {_name_reached(reached)}. Give a lower rank."
        )
    if any("inner_state" in path.split("/") for path in places):
        return (
            f"a state of galore was given where params or gradients belong: {shown}."
            " Look at the order of the arguments."
        )
    return (
        "galore projects no leaf of this tree, so it would save nothing. The leaves"
        f" are: {shown or 'none'}.{lower} Name axes with weight_dimension_numbers=, or"
        " use the inner optimizer alone."
    )
