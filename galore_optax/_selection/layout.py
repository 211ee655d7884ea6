# SPDX-License-Identifier: Apache-2.0
"""Which leaves of a model are linear maps, and along which axes.

The rule is a function of every path and shape of the tree at once, because no leaf
tells its role alone: an auto-named head is just `Dense_0/kernel`, and a stacked kernel
`(layers, in, out)` has as many axes as an attention kernel `(in, heads, head_dim)`.
It knows the layouts of Flax linen and NNX, Equinox, MaxText and Gemma; what a name
alone says is in `words.py`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from galore_optax._selection import words as _words

Shape = tuple[int, ...]

_ATTENTION_IN = re.compile(r"^((q|k|v)(_?proj)?|query|key|value)(_?proj)?$", re.I)
_ATTENTION_OUT = re.compile(r"^(o|out|o_?proj|out_?proj|attn_out)$", re.IGNORECASE)

# Gemma's, whose names say what axes they have: rows and cols, from the last axis.
_EINSUMS = {
    "q_einsum": ((-3, -1), (-2,), "attention"),  # (heads, in, head_dim)
    "kv_einsum": ((-3, -1), (-2,), "attention"),  # (2, heads, in, head_dim)
    "qkv_einsum": ((-3, -1), (-2,), "attention"),  # (3, heads, in, head_dim)
    "attn_vec_einsum": ((-1,), (-3, -2), "attention"),  # (heads, head_dim, out)
    "gating_einsum": ((-2,), (-1,), "stacked"),  # (2, out, in)
}
_MODEL_MATRICES = frozenset("ABCD")


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
    """What becomes of a leaf: its axes, or `None` for full size, and the reason."""

    axes: Axes | None
    reason: str
    named: bool = False  # the user names the axes, and is not the rule's to correct


def recognise(shapes: Mapping[str, Shape]) -> dict[str, Verdict]:
    """Decides for every leaf whether it is a linear map, and along which axes.

    Args:
      shapes: the shape of each leaf by normalised path.

    Returns:
      a verdict for each path.
    """
    stacks = _stack_axes(shapes)
    found = {path: _recognise(path, shape, stacks) for path, shape in shapes.items()}
    for reason, leaves in (
        ("state space", _state_spaces(shapes)),
        ("head", _heads(shapes, found)),
    ):
        found.update(
            {path: Verdict(None, reason) for path in leaves if found[path].axes}
        )
    return found


def _recognise(path: str, shape: Shape, stacks: Mapping[str, int]) -> Verdict:
    stack = stacks.get(path)
    core = tuple(axis for axis in range(len(shape)) if axis != stack)
    reason = _words.excluded(path)
    if reason is None:
        reason = "vector" if len(core) < 2 else _words.table(path)
    if reason:
        return Verdict(None, reason)
    if len(core) == 2:
        return Verdict(
            _linear(path, core), "stacked" if stack is not None else "matrix"
        )
    if len(core) == 3 and _words.is_expert(path):
        return Verdict(_linear(path, core[1:]), "experts")
    axes = _attention(path, core)
    if axes:
        return Verdict(axes, "attention")
    return _einsum(path, core) or Verdict(None, "unknown layout")


def _linear(path: str, core: Sequence[int]) -> Axes:
    first, second = core
    # Flax stores kernels, and MaxText its experts, as (in, out).
    name = _name(path)
    is_kernel = name == "kernel" or (name != "weight" and _words.is_expert(path))
    rows, cols = (second, first) if is_kernel else (first, second)
    return Axes((rows,), (cols,))


def _attention(path: str, core: tuple[int, ...]) -> Axes | None:
    if len(core) != 3 or _name(path) != "kernel":
        return None
    first, middle, last = core
    if _ATTENTION_IN.match(_module(path)):
        return Axes((middle, last), (first,))
    if _ATTENTION_OUT.match(_module(path)):
        return Axes((last,), (first, middle))
    return None


def _einsum(path: str, core: tuple[int, ...]) -> Verdict | None:
    name = _module(path) if _name(path) == "w" else _name(path)
    if name not in _EINSUMS or len(core) not in (3, 4):
        return None
    rows, cols, reason = _EINSUMS[name]
    axes = Axes(tuple(core[x] for x in rows), tuple(core[x] for x in cols))
    return Verdict(axes, reason)


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _module(path: str) -> str:
    return path.split("/")[-2] if "/" in path else ""


def _state_spaces(shapes: Mapping[str, Shape]) -> list[str]:
    """`A`, `B`, `C` and `D` beside a leaf that only a state-space model has."""
    models = {path.rpartition("/")[0] for path in shapes if _words.is_state_space(path)}
    return [
        path
        for path in shapes
        if _name(path) in _MODEL_MATRICES and path.rpartition("/")[0] in models
    ]


def _heads(shapes: Mapping[str, Shape], found: Mapping[str, Verdict]) -> list[str]:
    """The one kernel that ends in a vocabulary, where no head is named.

    A size that is also some kernel's input is a hidden width, vocabulary or not.
    """
    if any(verdict.reason == "head" for verdict in found.values()):
        return []
    by_output: dict[int, list[str]] = {}
    inputs = set()
    for path, verdict in found.items():
        if verdict.axes and verdict.reason == "matrix":
            by_output.setdefault(shapes[path][verdict.axes.rows[0]], []).append(path)
            inputs.add(shapes[path][verdict.axes.cols[0]])
    outputs = [by_output.get(v, []) for v in _vocabularies(shapes, found) - inputs]
    return [paths[0] for paths in outputs if len(paths) == 1]


def _vocabularies(
    shapes: Mapping[str, Shape], found: Mapping[str, Verdict]
) -> set[int]:
    return {
        shape[0]
        for path, shape in shapes.items()
        if len(shape) == 2
        and shape[0] != shape[1]
        and found[path].reason == "embedding"
        and not _words.is_position_or_type(path)
    }


def _stack_axes(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """The layer axis of every leaf that belongs to a stack of layers.

    A module is a stack when all its leaves share one extra axis, first or second:
    its vectors have two axes and its matrices three or more.
    """
    found: dict[str, int] = {}
    for module, members in _modules(shapes):
        if members[0] in found:
            continue
        axis = _shared_axis(module, {path: shapes[path] for path in members})
        if axis is not None:
            found.update(dict.fromkeys(members, axis))
    return found


def _modules(shapes: Mapping[str, Shape]) -> list[tuple[str, list[str]]]:
    """Path of, and leaves below, each inner node of the tree, outermost nodes first."""
    members: dict[tuple[str, ...], list[str]] = {}
    for path in shapes:
        parts = tuple(path.split("/"))
        for depth in range(len(parts)):
            members.setdefault(parts[:depth], []).append(path)
    return [("/".join(node), members[node]) for node in sorted(members, key=len)]


def _shared_axis(module: str, shapes: Mapping[str, Shape]) -> int | None:
    for axis in _candidate_axes(module, shapes):
        if len({shape[axis] for shape in shapes.values()}) == 1:
            return axis
    return None


def _candidate_axes(module: str, shapes: Mapping[str, Shape]) -> tuple[int, ...]:
    ranks = [len(shape) for shape in shapes.values()]
    if min(ranks) < 2 or max(ranks) < 3:
        return ()
    if any(_is_vector(path, shape) for path, shape in shapes.items()):
        # One `query` kernel (d, h, k) with its bias (h, k) shares axis 1 where h = k.
        return (0, 1) if sum(rank > 2 for rank in ranks) > 1 else (0,)
    if _holds_layers(module, shapes):
        return (0,)
    # `up (L, d, f)` beside `down (L, f, d)` is a stack; `query (d, h, k)` beside
    # `key (d, h, k)` is not.
    sizes = {math.prod(shape) for shape in shapes.values()}
    return (0,) if min(ranks) > 2 and len(sizes) < len(set(shapes.values())) else ()


def _is_vector(path: str, shape: Shape) -> bool:
    if len(shape) == 2 and _words.is_short_bias(path):
        return True
    return _words.is_bias(path) or any(map(_words.is_norm, path.split("/")[-2:]))


def _holds_layers(module: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether this is `blocks` or `layers`, written by hand as one stack.

    One leaf of it has to be no attention kernel, which has three axes by itself, and
    what has two axes has to be a vector's size of what has more.
    """
    if not _words.is_stack(_name(module)) or _is_numbered(module, shapes):
        return False
    matrices = {path: shape for path, shape in shapes.items() if len(shape) > 2}
    widths = {size for shape in matrices.values() for size in shape[1:]}
    return all(
        shape[1] in widths for shape in shapes.values() if len(shape) == 2
    ) and not all(
        len(shape) == 3 and _attention(path, (0, 1, 2))
        for path, shape in matrices.items()
    )


def _is_numbered(module: str, shapes: Mapping[str, Shape]) -> bool:
    children = (path[len(module) :].strip("/").split("/")[0] for path in shapes)
    return any(re.fullmatch(r"((layer|block)s?_?)?\d+", child) for child in children)
