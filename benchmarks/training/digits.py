# SPDX-License-Identifier: Apache-2.0
"""Classifies MNIST by the small vision transformer, with AdamW and with GaLore.

    python -m benchmarks.training.digits --minutes 30

Each method runs at each rate, both at the first one before any at the next; a run is
stored as soon as it ends, and no other is begun after so many minutes. Schedule, batch,
epochs and seed are the same for all. GaLore's rates are four times AdamW's, its updates
are scaled by a quarter.
"""

import dataclasses
import functools
from typing import Any

from benchmarks.lib import records
from benchmarks.training import tables

import classify

EPOCHS = 1
RATES = (
    1e-3,
    2e-3,
    4e-3,
    8e-3,
)  # of matrices: GaLore's are four times as high, times 0.25
METHODS = {"adamw": 1.0, "galore": 4.0}


def run_of(method: str, rate: float) -> classify.Run:
    peak = METHODS[method] * rate
    return classify.Run(method=method, learning_rate=peak, epochs=EPOCHS)


def measure(method: str, rate: float) -> dict[str, Any]:
    run = run_of(method, rate)
    print(f"{method}, {run.learning_rate:g}", flush=True)
    made = {"method": method, "rate": run.learning_rate}
    return made | classify.train(run)


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    minutes = parser.parse_args().minutes
    kept = records.Runs("training/digits")
    plan = {
        f"{method}, {run_of(method, rate).learning_rate:g}": functools.partial(
            measure, method, rate
        )
        for rate in RATES
        for method in METHODS
    }
    missing = kept.fill(plan, minutes)
    found = {key: kept.found[key] for key in plan if key in kept.found}
    result = {"run": _settings(), "runs": found}
    print(tables.digits(result))
    records.write("training/digits", result, missing, kept)


def _settings() -> dict[str, Any]:
    """What all runs share."""
    told = dataclasses.asdict(classify.Run(epochs=EPOCHS))
    return {k: told[k] for k in ("epochs", "batch", "rank", "gap", "weight_decay")}


if __name__ == "__main__":
    main()
