# SPDX-License-Identifier: Apache-2.0
"""A report of what a transformation projects and what its state costs."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax

from galore_optax._leaves import Flat, flatten, path_string
from galore_optax._matrices import Matrix
from galore_optax._record import plans_of
from galore_optax._stored import QuantizedProjector
from galore_optax._types import Scalar


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """What becomes of one leaf; sizes in bytes."""

    path: str
    shape: tuple[int, ...]
    reason: str  # what the rule took the leaf for
    matrix: str  # "batch x (rows x cols)", empty where nothing is projected
    side: str  # "left" (rows), "right" (cols), "full", or empty
    rank: int  # 0 where nothing is projected
    gap: Scalar
    scale: Scalar
    state_bytes: int  # projector, refresh counters and all that the inner holds
    adam_bytes: int  # of optax.adam for the same leaf

    @property
    def exceeds_adam(self) -> bool:
        return self.state_bytes > self.adam_bytes


@dataclasses.dataclass(frozen=True)
class Description:
    """One `LeafReport` a leaf, iterable; prints as a table; sizes in bytes."""

    leaves: tuple[LeafReport, ...]
    state_bytes: int  # of the whole state, counters included
    adam_bytes: int

    def __iter__(self) -> Iterator[LeafReport]:
        return iter(self.leaves)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user may not have meant."""
        found = [_warn_bytes(leaf) for leaf in self.leaves if leaf.exceeds_adam]
        unknown = [leaf for leaf in self.leaves if leaf.reason == "unknown layout"]
        return (*found, *map(_warn_unknown, unknown))

    def __str__(self) -> str:
        rows = [_HEADER, *map(_row, self.leaves), self._total()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [_line(row, widths) for row in rows]
        lines.insert(1, "-" * len(lines[0]))
        lines.insert(-1, "-" * len(lines[0]))
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])

    def _total(self) -> tuple[str, ...]:
        share = f"{self.state_bytes / max(self.adam_bytes, 1):.0%} of Adam"
        sizes = (_size(self.state_bytes), _size(self.adam_bytes))
        return ("total", "", share, "", "", "", *sizes)


_HEADER = ("leaf", "shape", "kind", "matrix", "side", "rank", "state", "Adam")


def _row(leaf: LeafReport) -> tuple[str, ...]:
    return (
        leaf.path or "(the tree itself)",
        "x".join(map(str, leaf.shape)),
        leaf.reason,
        leaf.matrix or "full size",
        leaf.side,
        str(leaf.rank or ""),
        _size(leaf.state_bytes) + ("!" if leaf.exceeds_adam else ""),
        _size(leaf.adam_bytes),
    )


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    left = [text.ljust(width) for text, width in zip(row[:5], widths[:5], strict=True)]
    right = [text.rjust(width) for text, width in zip(row[5:], widths[5:], strict=True)]
    return "  ".join(left + right).rstrip()


def _size(number: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number} B"


def _warn_bytes(leaf: LeafReport) -> str:
    return (
        f"'{leaf.path}' takes {_size(leaf.state_bytes)} of state, Adam"
        f" {_size(leaf.adam_bytes)}: lower its rank, keep it at full size, or give"
        " moment_dtype."
    )


def _warn_unknown(leaf: LeafReport) -> str:
    return (
        f"'{leaf.path}' {leaf.shape} stays at full size because its axes are unknown:"
        " name them with weight_dimension_numbers."
    )


def describe(tx: optax.GradientTransformation, params: Any) -> Description:
    """Reports what `tx` projects, and its state's bytes beside Adam's.

    Nothing is computed or allocated: shapes are enough.

    Args:
      tx: a transformation that contains `galore`, however wrapped.
      params: the parameters it is for, or their shapes (`jax.eval_shape`).

    Returns:
      a `Description`; `print` it for a table, iterate over it for the leaves.

    Raises:
      ValueError: `tx` contains no `galore`, or cannot be initialised with `params`.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> params = {"embed": jnp.ones((100, 16)), "up": {"kernel": jnp.ones((16, 64))}}
      >>> tx = galore_optax.galore_adamw(1e-3, rank=4)
      >>> print(galore_optax.describe(tx, params))
      leaf       shape   kind         matrix     side   rank     state      Adam
      --------------------------------------------------------------------------
      embed      100x16  embedding    full size               12.80 kB  12.80 kB
      up/kernel  16x64   matrix       64x16      right     4   2.30 kB   8.19 kB
      --------------------------------------------------------------------------
      total              72% of Adam                          15.13 kB  21.00 kB
    """
    records, state = plans_of(tx, params)
    flat = flatten(params)
    adam = jax.eval_shape(optax.adam(1.0).init, params)
    ours, theirs = _bytes_by_leaf(state, flat), _bytes_by_leaf(adam, flat)
    matrices = {m.path: m for record in records for m in record.plan.projected}
    reasons = {
        path: reason
        for record in records
        for path, reason in zip(
            record.plan.flat.paths, record.plan.reasons, strict=True
        )
    }
    leaves = tuple(
        _report(path, tuple(value.shape), reasons, matrices, ours[path], theirs[path])
        for path, value in zip(flat.paths, flat.values, strict=True)
    )
    return Description(leaves, _bytes(state), _bytes(adam))


def _report(
    path: str,
    shape: tuple[int, ...],
    reasons: Mapping[str, str],
    matrices: Mapping[str, Matrix],
    ours: int,
    theirs: int,
) -> LeafReport:
    matrix = matrices.get(path)
    reason = reasons.get(path, "outside galore")
    if matrix is None:
        return LeafReport(path, shape, reason, "", "", 0, 0, 1.0, ours, theirs)
    return LeafReport(
        path,
        shape,
        matrix.reason,
        _view(matrix),
        _side(matrix),
        matrix.rank,
        matrix.gap,
        matrix.scale,
        ours,
        theirs,
    )


def _view(matrix: Matrix) -> str:
    batch = f"{'x'.join(map(str, matrix.batch_shape))} x " if matrix.batch else ""
    text = f"{matrix.size(matrix.rows)}x{matrix.size(matrix.cols)}"
    return f"{batch}({text})" if batch else text


def _side(matrix: Matrix) -> str:
    if len(matrix.sides) > 1:
        return "full"
    return "left" if matrix.sides[0].axes == matrix.rows else "right"


def _bytes(tree: Any) -> int:
    return sum(_size_of(leaf) for leaf in jax.tree.leaves(tree))


def _size_of(leaf: Any) -> int:
    return int(np.prod(leaf.shape, dtype=np.int64)) * np.dtype(leaf.dtype).itemsize


def _bytes_by_leaf(state: Any, flat: Flat) -> dict[str, int]:
    """Bytes of `state` by the leaf whose path each of its arrays' paths ends with."""
    found = dict.fromkeys(flat.paths, 0)
    pairs, _ = jax.tree_util.tree_flatten_with_path(state)
    for path, leaf in pairs:
        owner = _owner(path_string(path), flat.paths)
        if owner is not None:
            found[owner] += _size_of(leaf)
    return found


def _owner(path: str, leaves: tuple[str, ...]) -> str | None:
    # One more name may follow: the side of a pair of projectors, a refresh counter; and
    # after that a part of a quantized projector.
    head, _, last = path.rpartition("/")
    endings = [path, head]
    if last in QuantizedProjector._fields:
        endings.append(head.rpartition("/")[0])
    owners = [
        leaf
        for leaf in leaves
        if not leaf or any(f"/{end}".endswith(f"/{leaf}") for end in endings)
    ]
    return max(owners, key=len, default=None)
