# SPDX-License-Identifier: Apache-2.0
"""Which leaves of a model are linear maps, and along which axes.

The rule is a function of every path and shape of the tree at once, because no leaf
tells its role alone: an auto-named head is just `Dense_0/kernel`, and a stacked kernel
`(layers, in, out)` has as many axes as an attention kernel `(in, heads, head_dim)`.
It knows the layouts of Flax linen and NNX, Equinox and MaxText.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

Shape = tuple[int, ...]

_EMBEDDING = re.compile(r"embed|(^|_)emb|emb(_|$)|^wte$|^wpe$", re.IGNORECASE)
_POSITION = re.compile(r"pos|wpe|type", re.IGNORECASE)
_HEAD = re.compile(
    r"(^|_)(lm)?head(_?\d+)?$|(^|_)(logits|unembed|classifier)|^score$", re.IGNORECASE
)
_NORM = re.compile(r"norm|(^|_)(ln|rms|bn)(_|\d|$)|^scale$|^gamma$|^beta$", re.I)
_CONV = re.compile(r"conv|patch", re.IGNORECASE)
_BIAS = re.compile(r"bias$", re.IGNORECASE)
_EXPERT = re.compile(r"expert|moe", re.IGNORECASE)
_ATTENTION_IN = re.compile(r"^((q|k|v)(_?proj)?|query|key|value)(_?proj)?$", re.I)
_ATTENTION_OUT = re.compile(r"^(o|out|o_?proj|out_?proj|attn_out)$", re.IGNORECASE)

_EXCLUDED_MODULES = (
    (_NORM, "norm"),
    (_EMBEDDING, "embedding"),
    (_CONV, "convolution"),
    (_HEAD, "head"),
)


@dataclasses.dataclass(frozen=True)
class Axes:
    """The output axes (rows) and input axes (columns) of a linear map.

    Every other axis is a batch axis.
    """

    rows: tuple[int, ...]
    cols: tuple[int, ...]

    @property
    def both(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.rows, self.cols


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the rule makes of a leaf: its axes, or `None`, and the reason."""

    axes: Axes | None
    reason: str


def recognise(shapes: Mapping[str, Shape]) -> dict[str, Verdict]:
    """Decides for every leaf whether it is a linear map, and along which axes.

    Args:
      shapes: the shape of each leaf by normalised path.

    Returns:
      a verdict for each path.
    """
    stacks = _stack_axes(shapes)
    heads = _heads(shapes, stacks)
    return {
        path: _recognise(path, shape, stacks.get(path), path in heads, shapes)
        for path, shape in shapes.items()
    }


def _recognise(
    path: str,
    shape: Shape,
    stack: int | None,
    head: bool,
    shapes: Mapping[str, Shape],
) -> Verdict:
    reason = _excluded(path, head)
    if reason:
        return Verdict(None, reason)
    core = tuple(axis for axis in range(len(shape)) if axis != stack)
    if len(core) < 2:
        return Verdict(None, "vector")
    if len(core) == 2:
        return Verdict(
            _linear(path, core), "stacked" if stack is not None else "matrix"
        )
    if len(core) == 3 and _any_part(_EXPERT, path):
        return Verdict(_linear(path, core[1:]), "experts")
    return _attention(path, core, shapes) or Verdict(None, "unknown layout")


def _excluded(path: str, head: bool) -> str | None:
    if _BIAS.search(_name(path)):
        return "bias"
    for pattern, reason in _EXCLUDED_MODULES:
        if _any_part(pattern, path):
            return reason
    return "head" if head else None


def _any_part(pattern: re.Pattern[str], path: str) -> bool:
    return any(pattern.search(part) for part in path.split("/"))


def _linear(path: str, core: Sequence[int]) -> Axes:
    first, second = core
    # Flax stores kernels, and MaxText its experts, as (in, out).
    name = _name(path)
    is_kernel = name == "kernel" or (name != "weight" and _any_part(_EXPERT, path))
    rows, cols = (second, first) if is_kernel else (first, second)
    return Axes((rows,), (cols,))


def _attention(
    path: str, core: tuple[int, ...], shapes: Mapping[str, Shape]
) -> Verdict | None:
    if len(core) != 3 or _name(path) != "kernel":
        return None
    module = path.split("/")[-2] if "/" in path else ""
    first, middle, last = core
    if _ATTENTION_IN.match(module):
        return Verdict(Axes((middle, last), (first,)), "attention")
    if _ATTENTION_OUT.match(module):
        return Verdict(Axes((last,), (first, middle)), "attention")
    return None


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _heads(shapes: Mapping[str, Shape], stacks: Mapping[str, int]) -> set[str]:
    """The one kernel whose output axis is a vocabulary, for each vocabulary."""
    kernels = {
        path: shape
        for path, shape in shapes.items()
        if len(shape) == 2 and path not in stacks and not _excluded(path, head=False)
    }
    found = set()
    for size in _vocabularies(shapes):
        outputs = [
            p for p, s in kernels.items() if s[_linear(p, (0, 1)).rows[0]] == size
        ]
        if len(outputs) == 1:
            found.update(outputs)
    return found


def _vocabularies(shapes: Mapping[str, Shape]) -> set[int]:
    return {
        shape[0]
        for path, shape in shapes.items()
        if len(shape) == 2
        and shape[0] != shape[1]
        and _any_part(_EMBEDDING, path)
        and not _any_part(_POSITION, path)
    }


def _stack_axes(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The layer axis of every leaf that belongs to a stack of layers.

    A module is a stack when all its leaves share one extra axis, first or second:
    its vectors have two axes and its matrices three or more.
    """
    found: dict[str, int] = {}
    for members in _modules(shapes):
        if members[0] in found:
            continue
        axis = _shared_axis({path: shapes[path] for path in members})
        if axis is not None:
            found.update(dict.fromkeys(members, axis))
    return found


def _modules(shapes: Mapping[str, Shape]) -> list[list[str]]:
    """The leaves below each inner node of the tree, outermost nodes first."""
    members: dict[tuple[str, ...], list[str]] = {}
    for path in shapes:
        parts = tuple(path.split("/"))
        for depth in range(len(parts)):
            members.setdefault(parts[:depth], []).append(path)
    return [members[node] for node in sorted(members, key=len)]


def _shared_axis(shapes: Mapping[str, Shape]) -> int | None:
    candidates = _candidate_axes(shapes)
    for axis in candidates:
        if len({shape[axis] for shape in shapes.values()}) == 1:
            return axis
    return None


def _candidate_axes(shapes: Mapping[str, Shape]) -> tuple[int, ...]:
    ranks = [len(shape) for shape in shapes.values()]
    if min(ranks) < 2 or max(ranks) < 3:
        return ()
    if not any(_is_vector(path) for path in shapes):
        # `up (L, d, f)` beside `down (L, f, d)` is a stack; `query (d, h, k)` beside
        # `key (d, h, k)` is not.
        sizes = {math.prod(shape) for shape in shapes.values()}
        return (0,) if min(ranks) > 2 and len(sizes) < len(set(shapes.values())) else ()
    # One `query` kernel (d, h, k) with its bias (h, k) shares axis 1 where h = k.
    return (0, 1) if sum(rank > 2 for rank in ranks) > 1 else (0,)


def _is_vector(path: str) -> bool:
    parent_and_name = "/".join(path.split("/")[-2:])
    return bool(_BIAS.search(_name(path))) or _any_part(_NORM, parent_and_name)
