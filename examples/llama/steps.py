# SPDX-License-Identifier: Apache-2.0
"""The functions of a run: initialise, train on a batch, evaluate a batch.

    state = (step, params, optimizer state), one pytree
    (state, batch (A, B/A, T + 1)) -> (state, metrics)      A parts, accumulated

The same functions run on one device and, by `mesh`, on many, of one process or of
several: the batch is split over `data` and `fsdp`, the parameters over `fsdp` and
`tensor`, and XLA adds the collectives.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import galore_optax
from galore_optax import layerwise

import layers
from data import PAD
from model import Config, LLaMA, Numerics

AXES = ("data", "fsdp", "tensor")
_OF_BATCH = AXES[:2]
# What the tensor axis splits: heads and hidden units, which come out of some matrices
# and go into others, and the vocabulary. The rest is whole on each of its devices.
_COMES_OUT = ("q", "k", "v", "gate", "up", "lm_head")
_GOES_IN = ("o", "down", "embed")


class State(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # int32 scalar: optimizer steps taken
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Program:
    """A model and an optimizer as pure functions."""

    config: Config
    numerics: Numerics
    tx: optax.GradientTransformation
    accumulation: int
    mesh: jax.sharding.Mesh | None
    graphdef: Any = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "graphdef", nnx.split(self.shapes(), nnx.Param)[0])

    def shapes(self) -> LLaMA:
        """The model without numbers."""
        return nnx.eval_shape(lambda: self._model(0))

    def _model(self, seed: int) -> LLaMA:
        return LLaMA(self.config, nnx.Rngs(seed), self.numerics)

    def init_params(self, seed: int) -> Any:
        """Fresh parameters, placed on the mesh."""
        places = jax.tree.map(lambda x: x.sharding, self.placed())
        return jax.jit(lambda: self._fresh(seed), out_shardings=places)()

    def placed(self) -> Any:
        """Shapes of the parameters, and where they lie."""
        return jax.tree.map_with_path(
            lambda keys, x: x.update(sharding=self._sharding(keys, x)),
            jax.eval_shape(lambda: self._fresh(0)),
        )

    def _fresh(self, seed: int) -> Any:
        return nnx.to_pure_dict(nnx.state(self._model(seed), nnx.Param))

    def init(self, params: Any) -> State:
        """Every array on all devices of the mesh, the optimizer's beside its leaf."""
        if self.mesh is None:
            return State(jnp.int32(0), params, self.init_optimizer(params))
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        step = jax.jit(lambda: jnp.int32(0), out_shardings=everywhere)()
        return State(step, params, self.init_on_mesh(params))

    def init_on_mesh(self, params: Any) -> Any:
        places = galore_optax.state_shardings(self.tx, params)
        return jax.jit(self.init_optimizer, out_shardings=places)(params)

    def init_optimizer(self, params: Any) -> Any:
        return self.tx.init(params)

    @property
    def on_mesh(self) -> optax.GradientTransformation:
        """The optimizer, which knows where parameters lie: XLA tells no one.

        Devices then share a refresh, each renewing its own matrices.
        """
        if self.mesh is None:
            return self.tx
        return galore_optax.sharded(self.tx, self.placed())

    def place(self, params: Any) -> Any:
        """Host arrays as parameters on the mesh, in the dtype of the run."""
        dtype = jnp.dtype(self.numerics.params)
        return jax.tree.map_with_path(
            lambda keys, x: _place(np.asarray(x, dtype), self._sharding(keys, x)),
            params,
        )

    def _sharding(self, keys: Any, leaf: Any) -> NamedSharding | None:
        if self.mesh is None:
            return None
        spec: list[str | None] = [None] * leaf.ndim
        tensor = _tensor_axis({key.key for key in keys}, leaf.ndim)
        if tensor is not None and leaf.shape[tensor] % self.mesh.shape["tensor"] == 0:
            spec[tensor] = "tensor" if self.mesh.shape["tensor"] > 1 else None
        size = self.mesh.shape["fsdp"]
        free = [a for a in range(leaf.ndim) if spec[a] is None]
        axes = [a for a in free if leaf.shape[a] % size == 0]
        if axes:
            # Of equal ones the last: GaLore keeps the output axis of a square matrix.
            spec[max(axes, key=lambda axis: (leaf.shape[axis], axis))] = "fsdp"
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def put(self, batch: np.ndarray) -> jax.Array:
        """A batch (B, T + 1) in parts (A, B/A, T + 1), each split over the devices."""
        return self._split(self._parts(batch), PartitionSpec(None, _OF_BATCH, None))

    def put_parts(self, batch: np.ndarray) -> list[jax.Array]:
        """The same, as A arrays (B/A, T + 1)."""
        spec = PartitionSpec(_OF_BATCH, None)
        return [self._split(part, spec) for part in self._parts(batch)]

    def _parts(self, batch: np.ndarray) -> np.ndarray:
        return batch.reshape(self.accumulation, -1, batch.shape[1])

    def _split(self, rows: np.ndarray, spec: PartitionSpec) -> jax.Array:
        return _place(rows, self.mesh and NamedSharding(self.mesh, spec))

    def loss(self, params: Any, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Cross-entropy in nats, summed over predicted tokens of (B, T + 1); count."""
        model = nnx.merge(self.graphdef, nnx.State(params))
        return layers.masked_loss(model(layers.inputs(batch)), batch[:, 1:])

    def mean_loss(self, parts: jax.Array) -> Callable[[Any, jax.Array], jax.Array]:
        """The share of one part in the mean loss over all predicted tokens of `parts`.

        `parts` are (A, B/A, T + 1), one of them (B/A, T + 1).
        """
        total = jnp.maximum(jnp.sum(parts[:, :, 1:] != PAD), 1)
        return lambda params, part: self.loss(params, part)[0] / total

    def gradients(self, params: Any, parts: jax.Array) -> tuple[jax.Array, Any]:
        """Mean loss over all predicted tokens of (A, B/A, T + 1), and its gradient."""
        mean = self.mean_loss(parts)
        if len(parts) == 1:
            return jax.value_and_grad(mean)(params, parts[0])

        def add(sums: Any, part: jax.Array) -> tuple[Any, None]:
            found = jax.value_and_grad(mean)(params, part)
            return jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, found), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        (loss, sums), _ = jax.lax.scan(add, (jnp.float32(0), zeros), parts)
        return loss, jax.tree.map(lambda s, p: s.astype(p.dtype), sums, params)

    def update(self, state: State, parts: jax.Array) -> tuple[State, dict[str, Any]]:
        """One optimizer step."""
        params, opt_state, loss, norm = self.advance(state, parts)
        metrics = {"loss": loss, "gradient_norm": norm}
        return State(state.step + 1, params, opt_state), metrics

    def advance(self, state: State, parts: jax.Array) -> tuple[Any, ...]:
        """Parameters and optimizer state after a step; loss; norm of the gradient."""
        loss, gradients = self.gradients(state.params, parts)
        update = self.on_mesh.update
        updates, opt_state = update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return params, opt_state, loss, optax.tree.norm(gradients)

    def diagnose(self, state: State, parts: jax.Array) -> dict[str, jax.Array]:
        """What the projection captures of the gradient of a batch, by name and path."""
        _, gradients = self.gradients(state.params, parts)
        return galore_optax.metrics(self.tx, state.opt_state, gradients)

    def compiled(self, state: State) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """`update`, which consumes its state, and `loss`, compiled for this state."""
        kept = None
        if self.mesh is not None:  # or XLA might move leaves between steps
            kept = jax.tree.map(lambda x: x.sharding, state), None
        update = jax.jit(self.update, donate_argnums=0, out_shardings=kept)
        return update, jax.jit(self.loss)


@dataclasses.dataclass(frozen=True)
class LayerProgram(Program):
    """The same, with each layer updated as soon as its gradient is there."""

    clip: layerwise.Clip | None = None
    form_gradients: bool = True
    step: layerwise.Step = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        model, remat = layers.functions(self.shapes()), self.numerics.remat
        options = {"remat": remat, "form_gradients": self.form_gradients}
        tx = self.tx
        if self.mesh is not None:
            tx = galore_optax.sharded(tx, layers.group(self.placed()))
        step = layerwise.make_step(model, tx, clip=self.clip, **options)
        object.__setattr__(self, "step", step)

    def init_on_mesh(self, params: Any) -> Any:
        return self.init_optimizer(params)  # where `sharded` was told

    def init_optimizer(self, params: Any) -> Any:
        return self.step.init(layers.group(params))

    def advance(self, state: State, parts: jax.Array) -> tuple[Any, ...]:
        params, opt_state, report = self.step.update(
            layers.group(state.params), state.opt_state, layers.with_weights(parts)
        )
        return layers.ungroup(params), opt_state, report.loss, report.norm


def _place(x: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    """An array that every process has, of which each keeps what its devices hold."""
    if sharding is None:
        return jax.device_put(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _tensor_axis(names: set[str], ndim: int) -> int | None:
    if ndim < 2:
        return None
    if names.intersection(_COMES_OUT):
        return ndim - 1
    return ndim - 2 if names.intersection(_GOES_IN) else None


def checked_axes(sizes: dict[str, Any]) -> dict[str, int]:
    for name, size in sizes.items():
        if name not in AXES or not isinstance(size, int) or size < 1:
            raise ValueError(
                f"mesh: {name}={size}; write data=N, fsdp=N, tensor=N or several."
            )
    return sizes


def make_mesh(axes: dict[str, int]) -> jax.sharding.Mesh | None:
    """A mesh with all of `AXES`, or `None` for one device."""
    if not axes:
        return None
    sizes = tuple(axes.get(name, 1) for name in AXES)
    found, needed = jax.devices(), math.prod(sizes)
    said = " ".join(f"{name}={size}" for name, size in axes.items())
    if needed > len(found):
        raise ValueError(f"mesh {said} needs {needed} devices, there are {len(found)}.")
    if needed < len(found) and jax.process_count() > 1:
        raise ValueError(
            f"mesh {said} has {needed} devices, but {jax.process_count()} processes"
            f" have {len(found)}, of which none may be left out."
        )
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, axis_types=auto, devices=found[:needed])


def state_bytes(opt_state: Any) -> int:
    """Bytes of the arrays that the optimizer really holds."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(opt_state))
