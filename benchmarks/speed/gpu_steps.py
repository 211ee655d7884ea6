# SPDX-License-Identifier: Apache-2.0
"""Steps on one device: of an optimizer, weights in place, and of whole training.

Comparisons are at equal precision: at 16-bit weights `optax.adamw` keeps its moments in
the dtype of the weights, ours in f32, so that it stands there twice, with its own and
with f32 moments.
"""

import dataclasses
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import galore_optax
from benchmarks.lib.shapes import Shapes, large_gradients, named, weights
from benchmarks.lib.subjects import GALORE, InPlace, optimizer, timed
from benchmarks.speed import rivals

import attention
from model import Config, Numerics
from never_formed import NeverFormedProgram
from peaks import peak_flops
from steps import LayerProgram, Program

GAP = 12
TRAINING_GAP = 200
BATCHES = 8


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer for one model."""

    model: str
    shapes: Shapes
    dtype: str
    stacked: bool
    optimizer: str

    def __str__(self) -> str:
        layout = "stacked" if self.stacked else "one leaf a matrix"
        return f"{self.model} {self.dtype}, {layout}: {self.optimizer}"

    def measure(self) -> dict[str, Any]:
        """Medians of steps; a refresh is what its step takes longer."""
        rank = self.shapes.width // 4
        tree = self.shapes.stacked() if self.stacked else self.shapes.tree()
        gradients = large_gradients(tree, self.dtype)
        tx = optimizer(self.optimizer, rank, GAP)
        subject = InPlace(tx, weights(tree, self.dtype))
        times = [subject.seconds(gradients) for _ in range(2 * GAP + 1)]
        steady = statistics.median(t for i, t in enumerate(times) if i % GAP)
        return {
            **{k: v for k, v in vars(self).items() if k != "shapes"},
            "rank": rank,
            "compile_seconds": subject.compile_seconds,
            "steady_seconds": steady,
            "first_refresh_seconds": times[0] - steady,
            "refresh_seconds": min(times[GAP], times[2 * GAP]) - steady,
            "state_bytes": subject.state_bytes,
        }


@dataclasses.dataclass(frozen=True)
class TorchStep:
    """One of `rivals.TORCH` in f32 on the same card, one parameter a matrix."""

    model: str
    shapes: Shapes
    optimizer: str
    device: str = "cuda"

    def __str__(self) -> str:
        return f"{self.model} float32, torch: {self.optimizer}"

    def measure(self) -> dict[str, Any]:
        import torch

        def made(shape: tuple[int, ...]) -> Any:
            turned = torch.randn(shape[::-1], device=self.device)
            parameter = torch.nn.Parameter(0.02 * turned)
            parameter.grad = 1e-3 * torch.randn_like(parameter)
            return parameter

        def waited() -> None:
            found.step()
            if self.device == "cuda":
                torch.cuda.synchronize()

        rank = self.shapes.width // 4
        shapes = named(self.shapes.tree())
        params = {path: made(shape) for path, shape in shapes.items()}
        found = rivals.torch_optimizer(self.optimizer, params, rank, GAP)
        if self.device == "cuda":
            torch.cuda.synchronize()
        times = [timed(waited)[0] for _ in range(GAP + 1)]
        steady = statistics.median(times[1:GAP])
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "rank": rank,
            "torch": torch.__version__,
            "steady_seconds": steady,
            "first_refresh_seconds": times[0] - steady,
            "refresh_seconds": times[GAP] - steady,
        }


@dataclasses.dataclass(frozen=True)
class Training:
    """One model trained by one method."""

    model: str
    method: str
    batch: int
    tokens: int  # a sequence
    steps: int = 50  # timed
    compute: str = "bfloat16"  # and the weights
    remat: bool = False
    layerwise: bool = False
    never: bool = False  # are gradients formed

    def __str__(self) -> str:
        marks = {"layerwise": self.layerwise, "never formed": self.never}
        remat = {"remat": self.remat and not self.layerwise}
        how = "".join(f", {mark}" for mark, on in (marks | remat).items() if on)
        count = self.batch * self.tokens
        return f"{self.model} {self.compute}, {count} tokens{how}: {self.method}"

    def measure(self) -> dict[str, Any]:
        config, program = Config.load(self.model), self.program()
        state = program.init(program.init_params(0))
        update, _ = program.compiled(state)
        batches = [program.put(self.made(config, i)) for i in range(BATCHES)]
        first, (state, _) = timed(update, state, batches[0])

        def run(state: Any) -> Any:
            for number in range(self.steps):
                state, _ = update(state, batches[number % BATCHES])
            return state

        total, state = timed(run, state)
        refresh = timed(update, at_refresh(state), batches[0])[0]
        return self._row(config, program, first, total / self.steps, refresh)

    def program(self) -> Program:
        config = Config.load(self.model)
        head = config.width // config.heads
        kernel = attention.implementation("auto", self.compute, head)
        numerics = Numerics(self.compute, self.compute, self.remat, kernel)
        tx = optimizer(self.method, config.width // 4, TRAINING_GAP)
        kind = Program
        if self.layerwise or self.never:
            kind = LayerProgram if self.layerwise else NeverFormedProgram
        return kind(config, numerics, tx, accumulation=1, mesh=None)

    def made(self, config: Config, seed: int) -> np.ndarray:
        """A batch of random tokens."""
        shape = self.batch, self.tokens + 1
        made = np.random.default_rng(seed).integers(0, config.vocab, shape)
        return made.astype(np.int32)

    def _row(
        self,
        config: Config,
        program: Program,
        first: float,
        steady: float,
        refresh: float,
    ) -> dict[str, Any]:
        count = self.batch * self.tokens
        seconds = ((TRAINING_GAP - 1) * steady + refresh) / TRAINING_GAP
        device = jax.local_devices()[0]
        flops = count / seconds * flops_per_token(config, self.tokens)
        peak = peak_flops(device.device_kind, self.compute)
        return {
            "model": self.model,
            "method": self.method,
            "tokens": count,
            "layerwise": self.layerwise,
            "never": self.never,
            "remat": self.remat,
            "attention": program.numerics.attention,
            "first_step_seconds": first,  # compiled and run
            "steady_seconds": steady,
            "refresh_seconds": refresh - steady,
            "step_seconds": seconds,  # a refresh counted at its share of a gap
            "tokens_per_second": count / seconds,
            "flops_per_second": flops,
            "flop_utilisation": peak and flops / peak,
            "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
        }


@dataclasses.dataclass(frozen=True)
class Equality:
    """Coordinates found without gradients beside those of gradients, on one device."""

    model: str
    compute: str  # and the weights
    batch: int = 4
    tokens: int = 64

    def __str__(self) -> str:
        return f"{self.model} {self.compute}"

    def measure(self) -> dict[str, Any]:
        run = Training(self.model, GALORE, self.batch, self.tokens, never=True)
        run = dataclasses.replace(run, compute=self.compute)
        config, program = Config.load(self.model), run.program()
        state = program.init(program.init_params(0))
        parts = program.put(run.made(config, 0))
        state = program.update(state, parts)[0]  # no basis is that of `init`

        def both(state: Any) -> tuple[Any, Any]:
            _, low, _ = program.coordinates(state, parts)
            _, gradients = program.gradients(state.params, parts)
            return low, galore_optax.project_gradients(
                program.tx, gradients, state.opt_state, state.params
            )[0]

        pairs = map(jax.tree.leaves, jax.jit(both)(state))
        errors = [_distance(x, y) for x, y in zip(*pairs, strict=True)]
        return {"model": self.model, "dtype": self.compute, "errors": errors}


def _distance(found: jax.Array, expected: jax.Array) -> float:
    """Relative, of norms."""
    x, y = (np.asarray(a, np.float64) for a in (found, expected))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def at_refresh(state: Any) -> Any:
    """The state of a step on which every basis is due."""

    def due(path: Any, x: Any) -> Any:
        counts = jax.tree_util.keystr(path[-1:]) == ".count"
        return jnp.full(x.shape, TRAINING_GAP, x.dtype) if counts else x

    return jax.tree_util.tree_map_with_path(due, state)


def flops_per_token(config: Config, tokens: int) -> float:
    """6 a matrix parameter, and attention's 12 T D a layer; nothing computed anew."""
    width, layers = config.width, config.layers
    matrices = layers * (4 * width**2 + 3 * width * config.hidden)
    return 6.0 * (matrices + width * config.vocab) + 12 * layers * width * tokens
