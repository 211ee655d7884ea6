# SPDX-License-Identifier: Apache-2.0
"""A whole training step, beside optax.contrib's GaLore and PyTorch's, on CPU.

LLaMA-60M, f32, one sequence of 256 random tokens: loss, gradients and update. Ours is
the example's program (examples/llama), PyTorch's the LLaMA of Hugging Face with the
same config. Steady steps, a refresh apart; each subject has a process of its own, and
they alternate step by step (`turns.py`).

    python -m benchmarks.speed.training_step [--model 60m] [--tokens 256] [--quick]

Needs the extras `examples` and `rivals`.
"""

import os
import statistics
import time
from typing import Any

import numpy as np

from benchmarks.lib import records
from benchmarks.lib.subjects import ADAMW, NEVER, OURS, THEIRS, optimizer, timed
from benchmarks.lib.turns import Rival
from benchmarks.speed import against_torch, rivals, tables

from model import Config, Numerics
from steps import Program

STEPS = 8
JAX = (ADAMW, OURS, THEIRS)


def make(name: str, model: str, tokens: int) -> Any:
    config = Config.load(model)
    batch = np.random.default_rng(0).integers(0, config.vocab, (1, tokens + 1))
    return (Example if name in JAX else HuggingFace)(name, config, batch)


class Example:
    """The training program of examples/llama."""

    def __init__(self, name: str, config: Config, batch: np.ndarray):
        tx = optimizer(name, config.width // 4)
        program = Program(config, Numerics(), tx, accumulation=1, mesh=None)
        self.state = program.init(program.init_params(0))
        self.batch = program.put(batch.astype(np.int32))
        update, _ = program.compiled(self.state)
        self.compile_seconds, self.update = timed(
            lambda: update.lower(self.state, self.batch).compile()
        )

    def step(self) -> float:
        seconds, (self.state, _) = timed(self.update, self.state, self.batch)
        return seconds

    def facts(self) -> dict[str, Any]:
        return {"compile_seconds": self.compile_seconds}


class HuggingFace:
    """LlamaForCausalLM with an optimizer of torch's or galore-torch's."""

    def __init__(self, name: str, config: Config, batch: np.ndarray):
        import torch
        import transformers

        torch.set_num_threads(os.cpu_count() or 1)
        sizes = transformers.LlamaConfig(**config.to_hugging_face())
        self.model = transformers.LlamaForCausalLM(sizes)
        self.batch = torch.from_numpy(batch)
        params = rivals.by_our_names(self.model)
        self.optimizer = rivals.torch_optimizer(name, params, config.width // 4, NEVER)

    def step(self) -> float:
        start = time.perf_counter()
        self.optimizer.zero_grad()
        # Hugging Face shifts the labels itself: one token more makes as many losses.
        self.model(input_ids=self.batch, labels=self.batch).loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        return {}


def measure(model: str, tokens: int, steps: int, names: list[str]) -> dict[str, Any]:
    started = {name: Rival(make, name, model, tokens) for name in names}
    first = {name: rival("step") for name, rival in started.items()}
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(steps):
        for name, rival in started.items():
            times[name].append(rival("step"))
    rows = {}
    for name, rival in started.items():
        steady = statistics.median(times[name])
        rows[name] = {"steady_seconds": steady, "first_seconds": first[name]}
        rows[name] |= {"tokens_per_second": tokens / steady} | rival("facts")
        rival.close()
    return rows


def main() -> None:
    parser = records.parser(__doc__, quick=True)
    parser.add_argument("--model", default="60m")
    parser.add_argument("--tokens", type=int, default=256)
    arguments = parser.parse_args()
    missing = against_torch.missing()
    names = [*JAX, *(rivals.TORCH if not missing else ())]
    model = "9m" if arguments.quick else arguments.model
    tokens = 64 if arguments.quick else arguments.tokens
    rows = measure(model, tokens, 3 if arguments.quick else STEPS, names)
    result = {"model": model, "tokens": tokens, "rows": rows}
    print(tables.training_step(result))
    name = f"speed/training_step_{model}"
    records.write(name, result, missing, quick=arguments.quick)


if __name__ == "__main__":
    main()
