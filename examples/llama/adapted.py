# SPDX-License-Identifier: Apache-2.0
"""The functions of a run whose layers' matrices are adapted: LoRA, ReLoRA or factors.

Embeddings, head and norms are trained in full, as in GaLore's Table 2. What is frozen
has neither gradient nor optimizer state.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

import adapters
import relora
from model import LLaMA
from steps import Program, State

KINDS = ("lora", "relora", "factors")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What takes the place of the layers' matrices."""

    kind: str
    rank: int
    alpha: float = 32.0  # LoRA's
    reset: int = 0  # ReLoRA's: steps between two restarts
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(
                f"unknown adapter {self.kind!r}; known: {', '.join(KINDS)}."
            )
        if self.rank < 1:
            raise ValueError(f"adapter_rank={self.rank} must be at least 1.")
        if (self.kind == "relora") != (self.reset > 0):
            raise ValueError(
                f"adapter_reset={self.reset} with adapter={self.kind}: a number of"
                " steps goes with relora, and with nothing else."
            )

    def apply(self, model: nnx.Module) -> None:
        """Adapts the matrices of the model's layers in place."""

        def inside(path: tuple[str, ...]) -> bool:
            return path[0] == "layers"

        if self.kind == "factors":
            adapters.factorize(model, self.rank, inside)
        else:
            rngs = nnx.Rngs(self._key(0))
            adapters.adapt(model, self.rank, self.alpha, inside, rngs)

    def restart(self, state: State) -> State:
        """ReLoRA's, at the end of a step."""
        key = self._key(state.step)
        found = relora.restart(state.params, state.opt_state, self.alpha, key)
        return State(state.step, *found)

    def _key(self, step: Any) -> jax.Array:
        # Apart from the model's own keys: without adapters it starts with the same W.
        return jax.random.fold_in(jax.random.key(self.seed), step)


@dataclasses.dataclass(frozen=True)
class AdaptedProgram(Program):
    """`Program` for an adapted model."""

    adapter: Adapter = Adapter("lora", 1)

    def _model(self, seed: int) -> LLaMA:
        model = super()._model(seed)
        self.adapter.apply(model)
        return model

    def place(self, params: Any) -> Any:
        """The same, for parameters of a model that is not adapted yet."""
        plain = nnx.eval_shape(lambda: super(AdaptedProgram, self)._model(0))
        graphdef, _ = nnx.split(plain, nnx.Param)
        model = nnx.merge(graphdef, nnx.State(params))
        self.adapter.apply(model)
        return super().place(nnx.to_pure_dict(nnx.state(model, nnx.Param)))

    def update(self, state: State, parts: jax.Array) -> tuple[State, dict[str, Any]]:
        state, metrics = super().update(state, parts)
        if self.adapter.reset:
            due = state.step % self.adapter.reset == 0
            state = jax.lax.cond(due, self.adapter.restart, lambda kept: kept, state)
        return state, metrics
