# SPDX-License-Identifier: Apache-2.0
"""What a training step holds, term by term, by formula.

A step has phases, and its peak is that of the largest. Beside weights and state:

    phase      gradients          activations              workspace
    head       none, then head    saved, logits            the head's
    blocks     blocks             saved                    one layer: weights, scores
    update     blocks, embedding  none                     none
    update     blocks             none                     coordinates of a leaf

The last line is GaLore's. XLA updates the head before the blocks' gradients exist.
Accumulation adds a second copy of all gradients. In layerwise steps `blocks` shrinks to
one layer, whose update happens in the same phase; accumulation adds coordinates in f32,
of which the compiler holds those of embedding and head twice. Where gradients are never
formed, coordinates take their place, and a refresh is a phase of its own.

The counts are of what JAX saves and what XLA's GPU compiler holds at its peak. The
attention is XLA's, which writes out the (H, T, T) scores of every sequence.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from galore_optax._asking.record import Recorded, heard
from galore_optax._asking.yardstick import adam_state
from galore_optax._context import within
from galore_optax._selection.leaves import flatten
from galore_optax._selection.matrices import Matrix
from galore_optax.backward.renewal import needs_gradients, shares_of
from galore_optax.layerwise import Model, make_step
from galore_optax.memory._bytes import StateBytes, state_bytes, tree_bytes
from galore_optax.memory._methods import Method
from galore_optax.memory._model import Setting, Sizes, shapes

_F32 = 4  # bytes, in which scores, norms, the loss and sums are computed
_COMMON = "copies that the compiler adds, rounding of addresses, the program itself"
_NO_ACTIVATIONS = "activations and the model's workspace: only its weights are known"
_REFRESH = "what a refresh of the projectors needs"
_BETWEEN = "activations that one pass of a refresh leaves to the next, without remat"
_SHARES = "what one of several shares of a refresh leaves to the next"
_NOTHING: Any = None
_NO_FUNCTIONS = Model(_NOTHING, _NOTHING, _NOTHING)  # `init` calls none
_shape = jax.ShapeDtypeStruct


class Phase(NamedTuple):
    """Bytes that a part of a step needs beside weights and state."""

    name: str
    gradients: int
    activations: int = 0
    workspace: int = 0

    @property
    def total(self) -> int:
        return self.gradients + self.activations + self.workspace


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one training step holds, in bytes."""

    name: str  # of the optimizer
    setting: Setting
    weights: int
    state: StateBytes
    adamw: int  # bytes of optax.adamw's state, its moments in the dtypes of the weights
    adamw_f32: int  # the same with f32 moments of 16-bit weights
    phases: tuple[Phase, ...]
    not_modelled: tuple[str, ...]

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def total(self) -> int:
        return self.weights + self.state.total + self.peak.total

    @property
    def terms(self) -> dict[str, int]:
        """Bytes by name, at the peak; they add up to `total`."""
        state = {k.replace("_", " "): v for k, v in self.state.kinds.items()}
        peak = self.peak._asdict()
        peak.pop("name")
        return {"weights": self.weights} | state | peak


def plan(
    model: Sizes | str | Any,
    method: Method | str | optax.GradientTransformation,
    setting: Setting = Setting(),  # noqa: B008
    name: str | None = None,
) -> Plan:
    """Bytes of one training step, by formula; nothing is allocated.

    .. math:: \\text{weights} + \\text{state} + \\max_{\\text{phase}}\\,
        (\\text{gradients} + \\text{activations} + \\text{workspace})

    Weights and state are exact: those of `jax.eval_shape(tx.init, shapes)`. For the
    formulas of the rest see `docs/memory.md`.

    Args:
      model: a name of `config_names()`, the path of a `config.json`, `Sizes`, or any
        tree of arrays or shapes, of which activations are unknown; `setting.dtype` is
        not used for the latter.
      method: a name, a `Method`, or any Optax transformation.
      setting: tokens, dtype, remat and so on.
      name: of the method in tables; its own if `None`.

    Returns:
      a `Plan`; `print(memory.table([plan]))` shows it.

    Raises:
      FileNotFoundError: an unknown model.
      ValueError: an unknown method or option; `layerwise` for a tree, or for a method
        that needs all gradients at once.

    Example:
      >>> from galore_optax import memory
      >>> method = memory.Method("galore_adamw8bit", (("rank", 1024),))
      >>> found = memory.plan("7b", method)
      >>> round(found.weights / 1e9, 2), round(found.state.total / 1e9, 2)
      (13.48, 5.8)
    """
    method = Method(method) if isinstance(method, str) else method
    model = Sizes.load(model) if isinstance(model, str) else model
    if isinstance(method, Method):
        name, method = name or str(method), method.make()
    return estimate(model, exact(model, method, setting), setting, name or "optimizer")


class Exact(NamedTuple):
    """What does not depend on how much a step computes at a time."""

    params: Any  # shapes
    records: tuple[Recorded, ...]
    state: StateBytes
    adamw: tuple[int, int]

    @property
    def matrices(self) -> list[Matrix]:
        return [matrix for x in self.records for matrix in x.plan.projected]

    def coordinates(self) -> Any:
        """A tree like params, each projected leaf of the shape of its coordinates."""
        flat, low = flatten(self.params), {}
        for matrix in self.matrices:
            low[matrix.path] = matrix.coordinate_shape
        pairs = zip(flat.paths, flat.values, strict=True)
        leaves = [_shape(low.get(path, x.shape), x.dtype) for path, x in pairs]
        return flat.treedef.unflatten(leaves)


def exact(
    model: Sizes | Any, tx: optax.GradientTransformation, setting: Setting
) -> Exact:
    """The exact part of a plan; `model` is `Sizes` or a tree.

    Raises:
      ValueError: layerwise steps of a tree, or with a `tx` that needs all gradients.
    """
    is_llama = isinstance(model, Sizes)
    params = shapes(model, setting.dtype) if is_llama else model
    params = jax.tree.map(lambda x: _shape(x.shape, x.dtype), params)
    records, state = heard(tx, params)
    if setting.layerwise:
        if not is_llama:
            raise ValueError(
                "layerwise needs to know the layers, but the model is only a tree of"
                " shapes. Give a configuration or galore_optax.memory.Sizes."
            )
        with within(records=[]):  # what is to be said of ranks is in the notes
            state = jax.eval_shape(make_step(_NO_FUNCTIONS, tx).init, params)
    return Exact(params, records, state_bytes(state), adam_state(params))


def estimate(model: Sizes | Any, exact: Exact, setting: Setting, name: str) -> Plan:
    """The plan of a step from its exact part."""
    missing = [_COMMON]
    if not isinstance(model, Sizes):
        found, missing = _of_tree(exact, setting), [_NO_ACTIVATIONS, _COMMON]
    elif setting.layerwise:
        found = _layerwise(activations(model, setting), exact, setting)
    else:
        found = _whole(activations(model, setting), exact, setting)
    phases = tuple(found)
    refreshes = "refresh" in {phase.name for phase in phases}
    by_passes = refreshes and not needs_gradients(exact.records)
    if exact.records and not (by_passes and setting.remat):
        missing.insert(0, _BETWEEN if by_passes else _REFRESH)
    if by_passes and setting.refresh_shares > 1:
        missing.insert(0, _SHARES)
    sizes = tree_bytes(exact.params), exact.state, *exact.adamw
    return Plan(name, setting, *sizes, phases, tuple(missing))


class Activations(NamedTuple):
    """Of one micro-batch, in bytes; for the letters see `docs/memory.md`."""

    saved: int  # all layers
    inputs: int  # all layers' inputs
    entries: int  # of logits: N·V, and not bytes
    head: int  # workspace: the normed input of the head and its gradient
    block: int  # workspace of a layer: scores, gradients of gate and up


def activations(sizes: Sizes, setting: Setting) -> Activations:
    """What one micro-batch keeps, and what it needs at a time."""
    z, s, n = sizes, setting.itemsize, setting.batch * setting.tokens
    scores = z.heads * setting.tokens * n  # entries, of a layer
    one = s * n * z.width
    # Inputs of products, two norms in f32, attention weights in f32 and rounded.
    products = 6 * z.hidden + 4 * z.width + 2 * z.query_width + 2 * z.key_width
    layer = (s * products + 2 * _F32 * z.width) * n + (_F32 + s) * scores
    # Scores and their gradient in f32, one rounded copy, the mask.
    block = (2 * _F32 + s + 1) * scores + 2 * s * z.hidden * n
    saved = z.layers * (one if setting.remat else layer)
    return Activations(saved, z.layers * one, n * z.vocab, 2 * one, block)


def _tied(a: Activations, exact: Exact, s: int) -> int:
    """What is kept until the embedding has its gradient, where the head shares it.

    Its part of that gradient, or that of the logits, from which it is made last.
    """
    return _is_tied(exact) * min(tree_bytes(exact.params.embed), s * a.entries)


def _is_tied(exact: Exact) -> bool:
    return "kernel" not in exact.params.head


def _head(a: Activations, gradient: int, s: int) -> Iterator[Phase]:
    """Logits in f32 and their gradient, and then the latter alone."""
    yield Phase("head", 0, a.saved + (_F32 + s) * a.entries, a.head)
    yield Phase("head", gradient, a.saved + s * a.entries, a.head)


def _whole(a: Activations, exact: Exact, setting: Setting) -> Iterator[Phase]:
    """Of a step that holds the gradients of all layers, or their coordinates."""
    never, s = setting.never_formed and bool(exact.matrices), setting.itemsize
    made = exact.coordinates() if never else exact.params
    embed, blocks, head = map(tree_bytes, made)
    # Sums of gradients lie beside those of a micro-batch; an update has them alone.
    sums = embed + blocks + head if setting.accumulation > 1 else 0
    layer, tied = _one_layer(exact) + a.block, _tied(a, exact, s)
    for phase in _head(a, head, s):
        yield phase._replace(gradients=phase.gradients + sums)
    yield Phase("blocks", sums + blocks + tied, a.saved, layer)
    yield Phase("update", sums or blocks + embed + tied)
    # A lifted leaf replaces its gradient, or has 16 bits and is fused into the weights.
    lifted = 2 * _F32 * _largest(exact, "shape") if never and s == _F32 else 0
    low = (s if never else _F32) * _largest(exact, "coordinate_shape")
    yield Phase("update", sums or blocks, 0, max(low, lifted))
    if never:
        yield from _refresh(a, exact, setting, layer)


def _refresh(
    a: Activations, exact: Exact, setting: Setting, layer: int
) -> Iterator[Phase]:
    """Before coordinates are made: by gradients, by passes that make none, or neither.

    Passes hold products of the size of coordinates, vectors that are searched with, and
    what these become, both like the projectors; of one share of the leaves at a time.
    """
    if needs_gradients(exact.records):
        yield Phase("refresh", tree_bytes(exact.params), a.saved, layer)
    elif any(map(_takes_passes, exact.records)):
        s, logits = setting.itemsize, 2 * _F32 * a.entries
        for share in shares_of(exact.matrices, setting.refresh_shares):
            matrices = [exact.matrices[position] for position in share]
            low = s * sum(math.prod(x.coordinate_shape) for x in matrices)
            searched = 2 * s * sum(map(_basis_entries, matrices))
            yield Phase("refresh", low, a.saved + logits, searched + layer)


def _layerwise(a: Activations, exact: Exact, setting: Setting) -> Iterator[Phase]:
    embed, _, head = map(tree_bytes, exact.params)
    layer, sums, copies = _one_layer(exact), 0, 0
    tied = _tied(a, exact, setting.itemsize)
    if setting.accumulation > 1:
        sums = _in_f32(exact.coordinates())
        # The loop over parts carries these sums, and the compiler copies them.
        copies = _in_f32((exact.params.embed, exact.params.head))
        copies += embed * _is_tied(exact)  # the head's part, beside the lookup's
    of_matrix = (math.prod(x.coordinate_shape) // x.count for x in exact.matrices)
    update = _F32 * max(of_matrix, default=0)
    for phase in (
        *_head(a, head, setting.itemsize),
        Phase("blocks", layer + tied, a.saved, layer + a.block),
        Phase("blocks", layer + tied, a.saved, layer + update),
        Phase("embedding", embed + tied, a.inputs),
    ):
        name, made, kept, work = phase
        yield Phase(name, sums + made, kept, work + copies)


def _of_tree(exact: Exact, setting: Setting) -> Iterator[Phase]:
    made = exact.coordinates() if setting.never_formed else exact.params
    held = tree_bytes(made)
    yield Phase("backward", held * (2 if setting.accumulation > 1 else 1))
    yield Phase("update", held, 0, _F32 * _largest(exact, "coordinate_shape"))


def _one_layer(exact: Exact) -> int:
    """Bytes of its weights."""
    leaves = jax.tree.leaves(exact.params.blocks)
    return tree_bytes(leaves) // int(leaves[0].shape[0])


def _largest(exact: Exact, shape: str) -> int:
    """Entries of the largest projected leaf, or of its coordinates."""
    sizes = (math.prod(getattr(matrix, shape)) for matrix in exact.matrices)
    return max(sizes, default=0)


def _basis_entries(matrix: Matrix) -> int:
    return sum(math.prod(matrix.projector_shape(side)) for side in matrix.sides)


def _takes_passes(record: Recorded) -> bool:
    method: Any = record.config.subspace
    return bool(record.plan.projected) and int(method.passes(jnp.bool_(True))) > 0


def _in_f32(tree: Any) -> int:
    return _F32 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
