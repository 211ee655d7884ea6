# SPDX-License-Identifier: Apache-2.0
"""Tables of what training reached."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.lib.cells import Load, table
from benchmarks.lib.paired import difference
from galore_optax._config import DEFAULT_SCALE

INTERVAL = "95 % interval", "more than seeds make"


def demo_seeds(load: Load) -> str:
    names = {
        "GaLore, default": "GaLore, default subspace method",
        "GaLore, svd": "GaLore, exact SVD",
        "AdamW": "AdamW",
    }
    found = load("training/demo_seeds")["final_validation_loss"]
    rows = [
        (name, ", ".join(f"{x:.3f}" for x in found[k])) for k, name in names.items()
    ]
    seeds = ", ".join(str(n) for n in range(len(found["AdamW"])))
    return table(("", f"seeds {seeds}"), rows)


def llama_9m(load: Load) -> str:
    names = {"AdamW": "AdamW", "GaLore": "GaLore, rank 32"}
    rows = [
        (
            name,
            f"{run['learning_rate']:g}",
            f"{run.get('matrix_rate', DEFAULT_SCALE):g}",
            f"{run['perplexity']:.1f}",
            f"{run['tokens_per_second']:,.0f}",
            f"{run['state_bytes']:,} bytes",
        )
        for key, name in names.items()
        for run in [load("training/llama_9m")["runs"][key]]
    ]
    head = "learning rate", "of matrices", "validation perplexity", "tokens/s"
    return table(("", *head, "optimizer state"), rows)


def pretraining(load: Load) -> str:
    """In the form of the paper's Table 2, best first."""
    result, speed = (
        load("training/pretraining_1m"),
        load("training/pretraining_speed_1m")["methods"],
    )
    rows = [
        (
            name,
            mean_and_deviation(row["perplexities"]) + diverged(row),
            *(f"{row['bf16_bytes'][part] / 1e6:.2f}" for part in ("weights", "states")),
            f"{speed[name]['tokens_per_second']:,.0f}",
            f"{row['learning_rate']:g}",
            f"{row['ratio']:g}" if name != result["control"] else "0",
        )
        for name, row in result["rows"].items()
    ]
    head = "", "perplexity", "weights, MB", "states, MB", "tokens/s"
    return table((*head, "learning rate", "of matrices"), rows)


def diverged(row: dict[str, Any]) -> str:
    return f" ({row['diverged']} diverged)" if row["diverged"] else ""


def mean_and_deviation(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def pretraining_galore(load: Load) -> str:
    """Losses less GaLore's, seed by seed; what diverged has no pair."""
    rows = load("training/pretraining_1m")["rows"]
    ours = rows["GaLore"]["losses"]
    cells = [
        (name, *_less(difference(row["losses"], ours).record()))
        for name, row in rows.items()
        if name != "GaLore" and len(row["losses"]) == len(ours)
    ]
    return table(("", "loss less GaLore's", *INTERVAL), cells)


def ablations(load: Load) -> str:
    """Every setting but those of rank and gap, which the picture shows."""
    result = load("training/ablations")
    rows = [
        (f"{study}: {row['name']}", f"{row['mean']:.4f}", *_less(row["less_base"]))
        for study, found in result["studies"].items()
        if study != result["grid"]
        for row in found[1:]
    ]
    head = "changed", "validation loss", "less the base's"
    return table((*head, *INTERVAL), rows)


def _less(found: dict[str, Any]) -> tuple[str, str, str]:
    interval = f"{found['low']:+.4f} to {found['high']:+.4f}"
    said = "yes" if found["beyond_seeds"] else "no"
    return f"{found['mean']:+.4f}", interval, said


def moments_bf16(load: Load) -> str:
    """By optimizer and dtype of moments, with the interval against its default."""
    none = "", "", ""
    rows = [
        (
            f"`{name}`",
            ", ".join(f"{loss:.3f}" for loss in row["losses"]),
            f"{row['perplexity']:.1f}",
            f"{row['state_bytes']:,} bytes",
            *(_less(row["less_base"]) if "less_base" in row else none),
        )
        for name, row in load("training/moments_bf16")["rows"].items()
    ]
    head = "", "validation loss by seed", "perplexity", "optimizer state"
    return table((*head, "loss less the default's", *INTERVAL), rows)


TASKS = {
    "cola": "CoLA, Matthews",
    "rte": "RTE, accuracy",
    "sst2": "SST-2, accuracy",
    "reviews": "film reviews, accuracy",
}


def finetuning(load: Load) -> str:
    """In the form of the paper's Table 4, scores in hundredths."""
    rows, slower = [], load("training/finetuning_speed")["over_adamw"]
    for name, cells in load("training/finetuning")["rows"].items():
        some = next(iter(cells.values()))
        scores = (
            mean_and_deviation([100 * x for x in cells[task]["dev_metric"]])
            if task in cells
            else ""
            for task in TASKS
        )
        size = f"{some['state_bytes']:,}", f"{some['trained']:,}"
        rows.append((name, *scores, *size, f"{slower[name]:.2f}"))
    head = "bytes of state", "trained", "step / AdamW's"
    return table(("", *TASKS.values(), *head), rows)


def finetuning_pairs(load: Load) -> str:
    """Scores less AdamW's in hundredths, where there are seeds to pair."""
    base, *others = load("training/finetuning")["rows"].items()
    rows = [
        (f"{name}, {TASKS[task]}", *_less_in_hundredths(cell, base[1][task]))
        for task in TASKS
        for name, cells in others
        if (cell := cells.get(task)) and len(cell["dev_metric"]) > 1
    ]
    return table(("", f"less {base[0]}'s", *INTERVAL), rows)


def _less_in_hundredths(cell: Any, base: Any) -> tuple[str, str, str]:
    scores = ([100 * x for x in found["dev_metric"]] for found in (cell, base))
    found = difference(*scores)
    interval = f"{found.low:+.2f} to {found.high:+.2f}"
    return f"{found.mean:+.2f}", interval, "yes" if found.beyond_seeds else "no"


ALL = (
    *(demo_seeds, llama_9m, pretraining, pretraining_galore, ablations),
    *(finetuning, finetuning_pairs, moments_bf16),
)
