# SPDX-License-Identifier: Apache-2.0
"""A whole training step whose gradients are never formed, beside others, on CPU.

The training program of examples/llama in f32: `optax.adamw`, GaLore, and GaLore with
`gradients="never"`, in turns, in one process, rank a quarter of the width. First blocks
of LLaMA-60M, 8,192 entries, 2,048 tokens a step, with and without remat; then over
tokens a step, with 32,000 entries, and one layer of wider models. A refresh is counted
at its share of a gap of 200.

    python -m benchmarks.speed.never_formed [--minutes 8] [--list] [--quick]

Goes on where it stopped: eight minutes make the first rows. Needs the extra `examples`.
"""

import dataclasses
import functools
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.lib import records
from benchmarks.lib.subjects import ADAMW, GALORE, optimizer, timed
from benchmarks.lib.training_steps import FORMED, NEVER
from benchmarks.speed import tables

from model import Config, Numerics
from never_formed import NeverFormedProgram
from steps import Program

GAP, SEQUENCE, TURNS, REFRESHES = 200, 256, 7, 2
SUBJECTS = {ADAMW: (ADAMW, FORMED), FORMED: (GALORE, FORMED), NEVER: (GALORE, NEVER)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model, batch and program."""

    model: str = "60m"
    layers: int | None = None  # as many as the model's
    vocab: int = 8_192
    tokens: int = 2_048  # a step
    remat: bool = False

    def __str__(self) -> str:
        depth = "" if self.layers is None else f", {self.layers} layer"
        remat = ", remat" if self.remat else ""
        return f"{self.model}{depth}, {self._numbers()}{remat}"

    def _numbers(self) -> str:
        return f"{self.vocab:,} entries, {self.tokens:,} tokens"

    @property
    def config(self) -> Config:
        whole = Config.load(self.model)
        layers = self.layers or whole.layers
        return dataclasses.replace(whole, vocab=self.vocab, layers=layers)

    def batch(self) -> np.ndarray:
        length = min(self.tokens, SEQUENCE)
        shape = self.tokens // length, length + 1
        found = np.random.default_rng(0).integers(0, self.vocab, shape)
        return found.astype(np.int32)

    def measure(self, turns: int = TURNS, refreshes: int = REFRESHES) -> dict[str, Any]:
        subjects = {name: Subject(self, *how) for name, how in SUBJECTS.items()}
        for subject in subjects.values():
            subject.step()
        for turn in range(turns):
            for subject in subjects.values():
                if turn < refreshes and subject.is_galore:
                    subject.refreshes.append(subject.refresh())
                subject.steady.append(subject.step())
        print(f"measured {self}", flush=True)
        rows = {name: subject.result(self) for name, subject in subjects.items()}
        return {
            **dataclasses.asdict(self),
            "rank": self.config.width // 4,
            "rows": rows,
        }


class Subject:
    """The training program with one optimizer, its state and its times."""

    def __init__(self, case: Case, name: str, gradients: str):
        make = NeverFormedProgram if gradients == NEVER else Program
        config, numerics = case.config, Numerics(remat=case.remat)
        tx = optimizer(name, config.width // 4, GAP)
        program = make(config, numerics, tx, accumulation=1, mesh=None)
        self.is_galore = name == GALORE
        self.state = program.init(program.init_params(0))
        self.batch = program.put(case.batch())
        update, _ = program.compiled(self.state)
        self.compile_seconds, self.update = timed(
            lambda: update.lower(self.state, self.batch).compile()
        )
        self.steady: list[float] = []
        self.refreshes: list[float] = []

    def step(self) -> float:
        seconds, (self.state, _) = timed(self.update, self.state, self.batch)
        return seconds

    def refresh(self) -> float:
        """A step on which every basis is due."""
        opt_state = optax.tree.set(self.state.opt_state, count=jnp.int32(GAP))
        opt_state = jax.tree.map(jnp.copy, opt_state)  # no buffer is donated twice
        self.state = self.state._replace(opt_state=opt_state)
        return self.step()

    def result(self, case: Case) -> dict[str, Any]:
        steady = statistics.median(self.steady)
        refresh = statistics.median(self.refreshes or [steady])
        mean = ((GAP - 1) * steady + refresh) / GAP
        return {
            "compile_seconds": self.compile_seconds,
            "steady_seconds": steady,
            "refresh_seconds": refresh - steady,
            "tokens_per_second": case.tokens / mean,
            "steady": self.steady,
        }


def cases() -> list[Case]:
    """In the order in which they are made."""
    return [
        *(Case(remat=remat) for remat in (False, True)),
        *(Case(tokens=tokens) for tokens in (128, 256, 512, 1_024, 4_096, 8_192)),
        *(Case(vocab=32_000, remat=remat) for remat in (False, True)),
        *(
            Case(model, layers=1, remat=remat)
            for model in ("350m", "1b")
            for remat in (False, True)
        ),
    ]


def main() -> None:
    parser = records.parser(__doc__, quick=True)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--list", action="store_true", help="what is on record")
    arguments = parser.parse_args()
    runs = records.Runs("speed/never_formed")
    plan = {str(case): functools.partial(case.measure) for case in cases()}
    if arguments.list:
        return records.show_list(runs, plan)
    if arguments.quick:
        case = Case("9m", layers=1, vocab=512, tokens=128)
        print(tables.never_formed_speed({"rows": [case.measure(2, 1)]}))
        return records.write("speed/never_formed", {}, quick=True)
    missing = runs.fill(plan, arguments.minutes)
    found = {"rows": [runs.found[name] for name in plan if name in runs.found]}
    print(tables.never_formed_speed(found))
    print(tables.never_formed_crossing(found))
    return records.write("speed/never_formed", found, missing, runs)


if __name__ == "__main__":
    main()
