# SPDX-License-Identifier: Apache-2.0
"""A report of what a transformation projects and what its state costs."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import optax

from galore_optax._asking import advice
from galore_optax._asking import table as tables
from galore_optax._asking.held import Held, held_by_leaf, tree_bytes
from galore_optax._asking.leaf_report import LeafReport
from galore_optax._asking.record import Recorded, plans_of
from galore_optax._asking.yardstick import adam_moments, adam_moments_in_f32, adam_state
from galore_optax._inner.params_use import ParamsUse
from galore_optax._placing.state import PerDevice, per_device
from galore_optax._selection.leaves import flatten
from galore_optax._selection.matrices import Matrix
from galore_optax._types import Scalar


@dataclasses.dataclass(frozen=True)
class Description:
    """One `LeafReport` a leaf, iterable; prints as a table; sizes in bytes."""

    leaves: tuple[LeafReport, ...]
    state_bytes: int  # of the whole state, counters included
    adam_bytes: int  # of optax.adamw's, its moments in the dtypes of the leaves
    adam_f32_bytes: int  # the same with f32 moments of 16-bit leaves
    params_use: tuple[str, ...]  # what each galore's inner does with params
    per_device: PerDevice | None = None  # where the parameters lie on a mesh

    def __iter__(self) -> Iterator[LeafReport]:
        return iter(self.leaves)

    @property
    def unprojected(self) -> dict[str, float]:
        """Shares of the matrix parameters at full size by reason, largest first."""
        return advice.unprojected(self.leaves)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a user may not have meant and can change, one a kind."""
        sizes = self.state_bytes, self.adam_bytes, self.adam_f32_bytes
        exceeds = self.state_bytes > self.adam_bytes
        whole = (advice.above_adamw(self.leaves, *sizes),) if exceeds else ()
        return (*whole, *advice.warnings(self.leaves))

    @property
    def notes(self) -> tuple[str, ...]:
        """What is good to know, one a kind."""
        return advice.notes(self.leaves)

    def __str__(self) -> str:
        sizes = self.state_bytes, self.adam_bytes, self.adam_f32_bytes
        parts = [
            tables.table(self.leaves, *sizes),
            tables.legend(self.leaves, self.adam_f32_bytes > self.adam_bytes),
            advice.shares(self.unprojected),
            *self.params_use,
            *tables.of_devices(self.per_device),
            *(f"note: {text}" for text in self.notes),
            *(f"warning: {text}" for text in self.warnings),
        ]
        return "\n".join(parts)


def describe(tx: optax.GradientTransformation, params: Any) -> Description:
    """Reports what `tx` projects, and its state's bytes beside Adam's.

    Nothing is computed or allocated: shapes are enough. Where they lie on a mesh, or
    `tx` is `sharded`, it says what each device holds, as `state_shardings` has it.

    Args:
      tx: a transformation that contains `galore`, however wrapped.
      params: the parameters it is for, or their shapes (`jax.eval_shape`).

    Returns:
      a `Description`; `print` it for a table, iterate over it for the leaves.

    Raises:
      TypeError: `tx` is no transformation, as where the two are swapped; a leaf of
        `params` is no array, such as a function in an unfiltered Equinox model.
      ValueError: `tx` contains no `galore`, or cannot be initialised with `params`.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> params = {"embed": jnp.ones((100, 16)), "up": {"kernel": jnp.ones((16, 64))}}
      >>> tx = galore_optax.galore_adamw(1e-3, rank=4)
      >>> print(galore_optax.describe(tx, params))
      leaf       shape   kind         matrix     side   rank     state      Adam
      --------------------------------------------------------------------------
      embed      100x16  embedding    full size               12.80 kB  12.80 kB
      up/kernel  16x64   matrix       64x16      right     4   2.31 kB   8.19 kB
      --------------------------------------------------------------------------
      total              72% of Adam                          15.13 kB  21.00 kB
      matrix: batch x (output x input); side: left projects the output, right the input
      state: projector and all that the inner holds; Adam: optax.adam's, in the leaf's
      dtype
      not projected: 61.0% of the matrix parameters (61.0% embedding)
      params: weight decay on all of W, unscaled
    """
    _check(tx, params)
    records, state = plans_of(tx, params)
    flat = flatten(params)
    held = held_by_leaf(state, params)
    verdicts = _verdicts(records)
    leaves = tuple(
        _report(path, value, verdicts.get(path, _OUTSIDE), of_leaf)
        for path, value, of_leaf in zip(flat.paths, flat.values, held, strict=True)
    )
    adam = adam_state(params)
    uses, each = _params_uses(records), per_device(tx, params, state)
    return Description(leaves, tree_bytes(state), *adam, uses, each)


def _check(tx: Any, params: Any) -> None:
    if _is_transformation(tx):
        return
    kind = type(tx).__name__
    if _is_transformation(params):
        raise TypeError(
            f"describe was given a {kind} where the transformation belongs, and a"
            " transformation where params belong. Swap them: describe(tx, params)."
        )
    raise TypeError(
        f"describe was given a {kind} where the transformation belongs. Write"
        " describe(tx, params), with tx such as galore_optax.galore(optax.adam(1e-3))."
    )


def _is_transformation(value: Any) -> bool:
    return callable(getattr(value, "init", None)) and callable(
        getattr(value, "update", None)
    )


class _Verdict(NamedTuple):
    reason: str
    matrix: Matrix | None
    rate: Scalar = 1.0  # where it is at full size


_OUTSIDE = _Verdict("outside galore", None)


def _verdicts(records: Sequence[Recorded]) -> dict[str, _Verdict]:
    return {
        path: _Verdict(reason, matrix, _rate(record))
        for record in records
        for path, reason, matrix in zip(
            record.plan.flat.paths,
            record.plan.reasons,
            record.plan.matrices,
            strict=True,
        )
    }


def _rate(record: Recorded) -> Scalar:
    rate = record.config.full_size_rate
    return 1.0 if rate is None else rate


_USES = {
    ParamsUse.IGNORED: "params: not used by the inner",
    ParamsUse.ADDITIVE: "params: weight decay on all of W, unscaled",
    ParamsUse.COORDINATES: "params: seen by the inner as coordinates; weight decay in"
    " coordinates only, none outside the span",
}


def _params_uses(records: Sequence[Recorded]) -> tuple[str, ...]:
    """One line where all inners do the same, else one for each and its first leaf."""
    firsts = {path: record for record in records for path in _projected(record)[:1]}
    uses = {path: record.use for path, record in firsts.items()}
    texts = {path: _USES[use] for path, use in uses.items() if use}
    if len(set(texts.values())) == 1:
        return tuple(set(texts.values()))
    return tuple(f"'{path}' and its like: {text}" for path, text in texts.items())


def _projected(record: Recorded) -> list[str]:
    return [matrix.path for matrix in record.plan.projected]


def _report(path: str, value: Any, verdict: _Verdict, held: Held) -> LeafReport:
    reason, matrix, rate = verdict
    adams = adam_moments(value), adam_moments_in_f32(value)
    of_state = held.bytes, held.wider(value.dtype), *adams
    of_leaf = path, tuple(value.shape), str(value.dtype), reason
    if matrix is None:
        return LeafReport(*of_leaf, "", "", 0, 0, 0, rate, *of_state)
    smaller = min(matrix.size(matrix.rows), matrix.size(matrix.cols))
    text = _view(matrix), _side(matrix), matrix.rank, smaller
    return LeafReport(*of_leaf, *text, matrix.gap, matrix.scale, *of_state)


def _view(matrix: Matrix) -> str:
    batch = f"{'x'.join(map(str, matrix.batch_shape))} x " if matrix.batch else ""
    text = f"{matrix.size(matrix.rows)}x{matrix.size(matrix.cols)}"
    return f"{batch}({text})" if batch else text


def _side(matrix: Matrix) -> str:
    if len(matrix.sides) > 1:
        return "full"
    return "left" if matrix.sides[0].axes == matrix.rows else "right"
