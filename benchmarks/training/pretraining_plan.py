# SPDX-License-Identifier: Apache-2.0
"""The methods of `pretraining.py`, what each gets, and which runs are wanted next."""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

from benchmarks.lib import records, tuning
from galore_optax import memory

from settings import Settings

CURVE = 6  # evaluations a run
SMALL, LARGE = (1 / 16, 1 / 4), (1 / 4, 1.0)
PLAIN = ("weight_decay=0.0",)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What every method gets."""

    model: str
    steps: int
    batch: int
    tokens: int
    rank: int  # a quarter of the width; the paper's for its sizes
    gap: int  # GaLore's, steps
    dtype: str = "float32"
    ratios: tuple[float, ...] = SMALL  # the matrices' learning rate over the rest's
    corpus: str = "core"
    eval_batches: int = 64

    @property
    def cycle(self) -> int:
        """Steps between two restarts of ReLoRA."""
        return max(2, self.steps // 10)

    def __str__(self) -> str:
        shape = f"{self.batch} x {self.tokens} of {self.corpus}"
        low = f"rank {self.rank}, gap {self.gap}, {self.dtype}"
        return f"{shape}, {self.eval_batches} held out, {low}"


# 60m and 130m: one pass over `core`.
BUDGETS = {
    "1m": Budget("1m", 750, 8, 128, 32, 50),
    "demo": Budget("demo", 1500, 8, 128, 64, 50),
    "60m": Budget("60m", 900, 64, 256, 128, 200, "bfloat16", LARGE),
    "130m": Budget("130m", 900, 64, 256, 256, 200, "bfloat16", LARGE),
}


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table: settings, and where its grids begin, by ratio; no others."""

    settings: dict[str, Any]
    first: dict[float, int]  # least exponent at first
    options: tuple[str, ...] = PLAIN

    def start(self, ratio: float) -> list[int]:
        return list(range(self.first[ratio], self.first[ratio] + 3))

    def run(self, budget: Budget, point: "Point") -> Settings:
        low, ratio = budget.rank, point.ratio
        found: dict[str, Any] = {"clip": 1.0, "matrix_rate": ratio} | self.settings
        options = self.options
        if memory.Method(found["optimizer"]).is_galore:
            own = {option.partition("=")[0] for option in options}
            usual = {"rank": low, "update_proj_gap": budget.gap}
            if found["optimizer"].startswith("galore_adamw"):
                usual["scale"], found["matrix_rate"] = ratio, 1.0
            options += tuple(f"{k}={x}" for k, x in usual.items() if k not in own)
        if found.get("adapter"):
            found["adapter_rank"] = low
        if found.get("adapter") == "relora":
            found["adapter_reset"] = budget.cycle
            found["adapter_warmup"] = max(1, budget.cycle // 10)
        return Settings(
            model=budget.model,
            corpus=budget.corpus,
            steps=budget.steps,
            batch=budget.batch,
            tokens=budget.tokens,
            compute_dtype=budget.dtype,
            params_dtype=budget.dtype,
            eval_every=max(1, budget.steps // CURVE),
            eval_batches=budget.eval_batches,
            log_every=50,
            learning_rate=point.rate,
            seed=point.seed,
            options=options,
            **found,
        )


FULL = {1 / 16: 0, 1 / 4: -2, 1.0: -3}  # from 0.01, 0.0025 and half of that
LOW = {1 / 16: 0, 1 / 4: -2, 1.0: -2}
# Of rows tuned after GaLore and APOLLO, around what was best for these.
LATER = {1 / 16: 2, 1 / 4: 0, 1.0: -2}
CONTROL = "Matrices not trained"
METHODS = {
    "AdamW": Method({"optimizer": "adamw"}, FULL),
    "AdamW, no clipping": Method({"optimizer": "adamw", "clip": 0.0}, FULL),
    "8-bit AdamW": Method({"optimizer": "adamw8bit"}, FULL),
    "Adafactor": Method(
        {"optimizer": "adafactor"},
        FULL,
        ("multiply_by_parameter_scale=False", "momentum=0.9"),
    ),
    "GaLore": Method({"optimizer": "galore_adamw"}, LOW),
    "8-bit GaLore": Method({"optimizer": "galore_adamw8bit"}, LOW),
    "GaLore, moments rotated": Method(
        {"optimizer": "galore_adamw"}, LATER, (*PLAIN, "moments=rotate")
    ),
    "Fira": Method({"optimizer": "fira_adamw"}, LATER, (*PLAIN, "scale=1.0")),
    "APOLLO": Method({"optimizer": "apollo_adamw"}, LATER),
    "APOLLO-Mini": Method(
        {"optimizer": "apollo_mini_adamw"}, LATER | {1 / 4: 1}, (*PLAIN, "rank=1")
    ),
    "LDAdam": Method({"optimizer": "ldadam"}, LATER, (*PLAIN, "update_proj_gap=1")),
    "LDAdam, no errors": Method(
        {"optimizer": "ldadam"},
        LATER,
        (*PLAIN, "update_proj_gap=1", "error_feedback=False"),
    ),
    "SARA, moments rotated": Method(
        {"optimizer": "galore_adamw"},
        LATER,
        (*PLAIN, "subspace=sara", "moments=rotate"),
    ),
    "Muon": Method(
        {"optimizer": "muon"},
        {1 / 16: 1, 1 / 4: 0, 1.0: -3},
        (*PLAIN, "consistent_rms=0.2"),
    ),
    "Muon in the subspace": Method(
        {"optimizer": "galore_muon"}, LATER, (*PLAIN, "consistent_rms=0.2")
    ),
    "SGD with momentum": Method(
        {"optimizer": "sgd"}, {1 / 16: 6, 1 / 4: 6, 1.0: 6}, ("momentum=0.9",)
    ),
    "LoRA": Method({"optimizer": "adamw", "adapter": "lora"}, LOW),
    "ReLoRA": Method({"optimizer": "adamw", "adapter": "relora"}, LOW),
    "Low-rank W = BA": Method({"optimizer": "adamw", "adapter": "factors"}, LOW),
    CONTROL: Method(
        {"optimizer": "adamw", "matrix_rate": 0.0},
        {1 / 4: -2},  # no other ratio: its matrices have no rate
    ),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """One run."""

    method: str
    ratio: float
    exponent: int
    seed: int = 0

    @property
    def rate(self) -> float:
        return tuning.rate(self.exponent)

    def __str__(self) -> str:
        matrices = f"matrices at {self.ratio:g}"
        return f"{self.method}, lr {self.rate:g}, {matrices}, seed {self.seed}"


class Record:
    """The runs that there are, and those that are wanted next."""

    def __init__(self, budget: Budget, seeds: int):
        self.runs = records.Runs(f"training/pretraining_{budget.model}_{budget.steps}")
        self.budget, self.ratios, self.seeds = budget, budget.ratios, range(seeds)

    def key(self, point: Point) -> str:
        return f"{point}, {self.budget}"

    def found(self, point: Point) -> dict[str, Any] | None:
        return self.runs.found.get(self.key(point))

    def row(self, method: str, ratio: float) -> dict[int, float | None]:
        """Losses of seed 0 by exponent."""
        points = (Point(method, ratio, k) for k in range(-20, 10))
        found = ((p.exponent, self.found(p)) for p in points)
        return {k: run["validation_loss"] for k, run in found if run}

    def best(self, method: str) -> Point | None:
        """The best rate and ratio of seed 0, so far."""
        points = [
            (loss, Point(method, ratio, k))
            for ratio in self.ratios
            for k, loss in self.row(method, ratio).items()
            if loss is not None
        ]
        return min(points, key=lambda pair: pair[0])[1] if points else None

    def wanted(self, method: str) -> list[Point]:
        """What a method still needs, as far as that is known; its ratios in turns."""
        start = METHODS[method].start
        rows = [
            [Point(method, x, k) for k in tuning.wanted(self.row(method, x), start(x))]
            for x in self.ratios
            if x in METHODS[method].first
        ]
        turns = itertools.chain.from_iterable(itertools.zip_longest(*rows))
        grid = [point for point in turns if point]
        return grid or [p for p in self.at_best(method) if not self.found(p)]

    def tried(self, method: str) -> list[Point]:
        """Those on record."""
        grid = [Point(method, x, k) for x in self.ratios for k in self.row(method, x)]
        return grid + [x for x in self.at_best(method) if x.seed and self.found(x)]

    def at_best(self, method: str) -> list[Point]:
        best = self.best(method)
        return [dataclasses.replace(best, seed=s) for s in self.seeds] if best else []

    def next(self, methods: Iterable[str]) -> Point | None:
        """A run of the method that has the fewest, so that all progress together."""
        unfinished = [name for name in methods if self.wanted(name)]
        fewest = min(unfinished, key=lambda x: len(self.tried(x)), default=None)
        return self.wanted(fewest)[0] if fewest else None

    def missing(self) -> list[str]:
        found = [str(point) for name in METHODS for point in self.wanted(name)]
        more = "and what grids then want at their edges, and all seeds at the best"
        return found if all(map(self.is_tuned, METHODS)) else [*found, more]

    def is_tuned(self, method: str) -> bool:
        """Whether seeds are all that is wanted, if anything is."""
        return all(point.seed for point in self.wanted(method))
