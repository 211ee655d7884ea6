# SPDX-License-Identifier: Apache-2.0
"""What a description says beside its table: one line for each kind of finding."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from galore_optax._asking.fold import Line, fold
from galore_optax._asking.leaf_report import LeafReport, size

_EXAMPLES = 3
_LEAST = 0.001  # share that is told as a number
# Counters and the scales of small arrays stay below this.
_NOTABLE = 1.1
# What is called so is a linear map; another name says nothing, and the shape decides.
_NAMES_OF_WEIGHTS = frozenset({"kernel", "weight"})

Leaves = Sequence[LeafReport]


def unprojected(leaves: Leaves) -> dict[str, float]:
    """Shares of the matrix parameters at full size by reason, the largest first."""
    matrices = [leaf for leaf in leaves if leaf.holds_matrices]
    total = sum(leaf.entries for leaf in matrices)
    counts: dict[str, int] = {}
    for leaf in matrices:
        if not leaf.is_projected:
            counts[leaf.reason] = counts.get(leaf.reason, 0) + leaf.entries
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return {reason: count / total for reason, count in ordered if count}


def shares(found: dict[str, float]) -> str:
    """`unprojected` in words."""
    if not found:
        return "not projected: none of the matrix parameters"
    parts = ", ".join(f"{_percent(share)} {reason}" for reason, share in found.items())
    whole = _percent(sum(found.values()))
    return f"not projected: {whole} of the matrix parameters ({parts})"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= _LEAST else f"under {_LEAST:.1%}"


class Kind(NamedTuple):
    """A finding that several leaves may have in common."""

    title: str
    has: Callable[[LeafReport], bool]
    remedy: Callable[[Leaves], str]
    show: Callable[[Line], str]

    def told(self, leaves: Leaves) -> str:
        """What, how many, the first of them, and what to do."""
        lines = fold(leaves)
        shown = ", ".join(map(self.show, lines[:_EXAMPLES]))
        more = " and others" if len(lines) > _EXAMPLES else ""
        count = f" ({len(leaves)} leaves)" if len(leaves) > 1 else ""
        return f"{self.title}{count}: {shown}{more}. {self.remedy(leaves)}"


def _with_shape(line: Line) -> str:
    return f"'{line.path}' ({'x'.join(map(str, line.leaf.shape))})"


def _with_rank(line: Line) -> str:
    return f"{_with_shape(line)} at rank {line.leaf.rank}"


def _with_bytes(line: Line) -> str:
    ours, adams = size(line.leaf.state_bytes), size(line.leaf.adam_bytes)
    return f"'{line.path}' {ours} against {adams}"


def _is_projected_above_adam(leaf: LeafReport) -> bool:
    return leaf.is_projected and leaf.exceeds_adam and not leaf.rank_is_full


def _lower_rank(leaves: Leaves) -> str:
    wide_alone = all(x.state_bytes - x.wider_bytes <= x.adam_bytes for x in leaves)
    narrower = ", or give moment_dtype=jnp.bfloat16" if wide_alone else ""
    return f"Lower the rank, {_KEEP}{narrower}."


def _is_whole_above_adam(leaf: LeafReport) -> bool:
    narrow = leaf.state_bytes - leaf.wider_bytes
    return not leaf.is_projected and narrow > _NOTABLE * leaf.adam_bytes


def _is_bare(leaf: LeafReport) -> bool:
    name = leaf.path.rpartition("/")[2]
    told = leaf.reason in ("matrix", "stacked") and name not in _NAMES_OF_WEIGHTS
    return leaf.is_projected and told


def _has_own_rate(leaf: LeafReport) -> bool:
    if leaf.is_projected or not isinstance(leaf.scale, float):  # or traced
        return False
    return leaf.scale != 1


def _with_rate(line: Line) -> str:
    return f"'{line.path}' times {line.leaf.scale:g}"


def _wider_moments(leaves: Leaves) -> str:
    more = size(sum(leaf.wider_bytes for leaf in leaves))
    return (
        f"They take {more} more than 16-bit ones, in which a second moment loses what"
        " b2=0.999 adds; moment_dtype=jnp.bfloat16 saves that."
    )


_KEEP = "keep them at full size with weight_dimension_numbers"
_WARNINGS = (
    Kind(
        "the rank reaches a dimension, which saves nothing",
        lambda leaf: leaf.rank_is_full,
        lambda _: f"Lower it, or {_KEEP}.",
        _with_rank,
    ),
    Kind(
        "at full size because the rank would save nothing",
        lambda leaf: leaf.reason == "rank saves nothing",
        lambda _: "Lower the rank to project them.",
        _with_shape,
    ),
    Kind(
        "projected, with more state than optax.adam",
        _is_projected_above_adam,
        _lower_rank,
        _with_bytes,
    ),
    Kind(
        "at full size, with more state than optax.adam",
        _is_whole_above_adam,
        lambda _: (
            "The inner optimizer holds that: take another, or project what is a"
            " linear map with weight_dimension_numbers."
        ),
        _with_bytes,
    ),
    Kind(
        "at full size because their axes are unknown",
        lambda leaf: leaf.reason == "unknown layout",
        lambda _: "Name them with weight_dimension_numbers.",
        _with_shape,
    ),
)
_NOTES = (
    Kind(
        "at full size, with a learning rate of their own",
        _has_own_rate,
        lambda _: "Decay is multiplied too: full_size_rate.",
        _with_rate,
    ),
    Kind(
        "projected by shape alone",
        _is_bare,
        lambda _: f"If one is no linear map, {_KEEP}.",
        _with_shape,
    ),
    Kind(
        "f32 moments of 16-bit leaves",
        lambda leaf: leaf.wider_bytes > 0,
        _wider_moments,
        _with_shape,
    ),
)


def _found(kinds: Sequence[Kind], leaves: Leaves) -> tuple[str, ...]:
    chosen = [(kind, [x for x in leaves if kind.has(x)]) for kind in kinds]
    return tuple(kind.told(found) for kind, found in chosen if found)


def warnings(leaves: Leaves) -> tuple[str, ...]:
    """What a user may not have meant and can change."""
    return _found(_WARNINGS, leaves)


def notes(leaves: Leaves) -> tuple[str, ...]:
    """What is good to know."""
    return _found(_NOTES, leaves)


def above_adamw(leaves: Leaves, state: int, adam: int, adam_f32: int) -> str:
    """That the whole state exceeds that of `optax.adamw`, and what to do."""
    in_f32 = f" ({size(adam_f32)} with f32 moments)" if adam_f32 > adam else ""
    wider = sum(leaf.wider_bytes for leaf in leaves)
    cure = "moment_dtype=jnp.bfloat16, " if state - wider <= adam else ""
    return (
        f"the state takes {size(state)}, optax.adamw's {size(adam)}{in_f32}: try"
        f" {cure}a lower rank or moments in eight bits."
    )
