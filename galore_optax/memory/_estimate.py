# SPDX-License-Identifier: Apache-2.0
"""What a training step holds, term by term, by formula.

A step has phases, and its peak is that of the largest. Beside weights and state:

    phase      gradients          activations              workspace
    head       head               saved, logits            the head's
    blocks     blocks             saved                    one layer: weights, scores
    update     blocks, embedding  none                     none
    update     blocks             none                     coordinates of a leaf

The last line is GaLore's. XLA updates the head before the blocks' gradients exist.
Accumulation adds a second copy of all gradients. In layerwise steps `blocks` shrinks to
one layer, whose update happens in the same phase; accumulation adds coordinates in f32,
of which the compiler holds those of embedding and head twice.
"""

import dataclasses
from typing import Any

import jax
import optax

from galore_optax._asking.record import heard
from galore_optax._asking.yardstick import adam_state
from galore_optax.layerwise import Model, Params, make_step
from galore_optax.memory._activations import Activations
from galore_optax.memory._bytes import StateBytes, state_bytes, tree_bytes
from galore_optax.memory._methods import Method
from galore_optax.memory._setting import Setting
from galore_optax.memory._shapes import shapes
from galore_optax.memory._sizes import Sizes
from galore_optax.memory._workspace import (
    Measured,
    coordinate_bytes,
    coordinates,
    largest_stack,
)


@dataclasses.dataclass(frozen=True)
class Phase:
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
        peak = vars(self.peak)
        return {"weights": self.weights} | state | {k: peak[k] for k in _OF_PHASE}


_WIDE = 4  # bytes of an entry of a sum
_NOTHING: Any = None
_NO_FUNCTIONS = Model(_NOTHING, _NOTHING, _NOTHING)  # `init` calls none
_OF_PHASE = ("gradients", "activations", "workspace")
_COMMON = "copies that the compiler adds, rounding of addresses, the program itself"
_NO_ACTIVATIONS = "activations and the model's workspace: only its weights are known"
_NO_LAYERS = (
    "layerwise needs to know the layers, but the model is only a tree of shapes. Give a"
    " configuration or galore_optax.memory.Sizes."
)
_REFRESH = "what a refresh of the projectors needs"


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
      ValueError: an unknown method or option; a tree with `layerwise`.

    Example:
      >>> from galore_optax import memory
      >>> method = memory.Method("galore_adamw8bit", (("rank", 1024),))
      >>> found = memory.plan("7b", method)
      >>> round(found.weights / 1e9, 2), round(found.state.total / 1e9, 2)
      (13.48, 5.76)
    """
    method = Method(method) if isinstance(method, str) else method
    tx = method.make() if isinstance(method, Method) else method
    label = name or (str(method) if isinstance(method, Method) else "optimizer")
    if isinstance(model, str):
        model = Sizes.load(model)
    return estimate(model, measure(model, tx, setting), setting, label)


def measure(
    model: Sizes | Any, tx: optax.GradientTransformation, setting: Setting
) -> Measured:
    """The exact part of a plan; `model` is `Sizes` or a tree.

    Raises:
      ValueError: layerwise steps of a tree, or with a `tx` that needs all gradients.
    """
    is_llama = isinstance(model, Sizes)
    params = shapes(model, setting.dtype) if is_llama else model
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    records, state = heard(tx, params)
    if setting.layerwise:
        if not is_llama:
            raise ValueError(_NO_LAYERS)
        state = jax.eval_shape(make_step(_NO_FUNCTIONS, tx).init, params)
    return Measured(params, records, state_bytes(state), *adam_state(params))


def estimate(
    model: Sizes | Any, measured: Measured, setting: Setting, name: str
) -> Plan:
    """The plan of a step from its exact part."""
    if isinstance(model, Sizes):
        phases = _phases(model, measured, setting)
        missing: tuple[str, ...] = (_COMMON,)
    else:
        phases, missing = _tree_phases(measured, setting), (_NO_ACTIVATIONS, _COMMON)
    if measured.records:
        missing = (_REFRESH, *missing)
    weights = tree_bytes(measured.params)
    adamw = measured.adamw, measured.adamw_f32
    return Plan(name, setting, weights, measured.state, *adamw, phases, missing)


def _phases(sizes: Sizes, measured: Measured, setting: Setting) -> tuple[Phase, ...]:
    activations = Activations(sizes, setting)
    if setting.layerwise:
        return _layerwise_phases(sizes, measured, activations)
    found = _plain_phases(sizes, measured, activations)
    if setting.accumulation == 1:
        return found
    sums = tree_bytes(measured.params)
    return tuple(_with_sums(phase, sums) for phase in found)


def _with_sums(phase: Phase, sums: int) -> Phase:
    """Sums of gradients lie beside those of a micro-batch; an update has them alone."""
    if phase.name == "update":
        return dataclasses.replace(phase, gradients=sums)
    return dataclasses.replace(phase, gradients=phase.gradients + sums)


def _plain_phases(
    sizes: Sizes, measured: Measured, activations: Activations
) -> tuple[Phase, ...]:
    params: Params = measured.params
    embed, blocks, head = map(tree_bytes, params)
    a, layer = activations, blocks // sizes.layers
    low = coordinate_bytes(measured.records)
    return (
        Phase("head", head, a.saved + a.logits, a.head_workspace),
        Phase("blocks", blocks, a.saved, layer + a.block_workspace),
        Phase("update", blocks + embed),
        Phase("update", blocks, 0, low),
    )


def _layerwise_phases(
    sizes: Sizes, measured: Measured, activations: Activations
) -> tuple[Phase, ...]:
    params: Params = measured.params
    embed, blocks, head = map(tree_bytes, params)
    a, layer = activations, blocks // sizes.layers
    update = coordinate_bytes(measured.records) // largest_stack(measured.records)
    sums, copies = 0, 0
    if a.setting.accumulation > 1:
        sums = coordinates(measured)
        # The loop over parts carries these sums, and the compiler copies them.
        copies = (embed + head) // a.setting.itemsize * _WIDE
    phases = (
        Phase("head", sums, a.saved + a.logits, a.head_workspace),
        Phase("head", sums + head, a.saved + a.logit_gradients, a.head_workspace),
        Phase("blocks", sums + layer, a.saved, layer + a.block_workspace),
        Phase("blocks", sums + layer, a.saved, layer + update),
        Phase("embedding", sums + embed, sizes.layers * a.layer_input),
    )
    return tuple(
        dataclasses.replace(phase, workspace=phase.workspace + copies)
        for phase in phases
    )


def _tree_phases(measured: Measured, setting: Setting) -> tuple[Phase, ...]:
    weights = tree_bytes(measured.params)
    copies = 2 if setting.accumulation > 1 else 1
    update = Phase("update", weights, 0, coordinate_bytes(measured.records))
    return Phase("backward", weights * copies), update
