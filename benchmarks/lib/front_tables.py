# SPDX-License-Identifier: Apache-2.0
"""Tables of the first page: of memory, time and quality one each, and of rates."""

from typing import Any

from benchmarks.lib.tables import gb, mean_and_deviation, model, of, table

Found = dict[str, Any]
LAYERWISE, NEVER = "a layer at a time", "gradients never formed"
WAYS = {"layerwise": LAYERWISE, "never formed": NEVER}
NAMES = "AdamW", "GaLore"
MOMENTUM = {"Adafactor": "Adafactor, with momentum"}
METHODS = (
    "AdamW",
    "8-bit AdamW",
    "Muon",
    "Adafactor",
    "GaLore",
    "8-bit GaLore",
    "LoRA",
)
ADAMW_F32, GALORE = "optax.adamw, f32 moments", "galore_adamw"
SCALE, SCALE_MINILM = 0.25, 4.0  # of matrices, GaLore's: its default, alpha / rank


def way(row: Found) -> str:
    """How gradients are held in a step of `memory/step_7b`."""
    return next((name for key, name in WAYS.items() if key in row["setting"]), "all")


@of("memory/step_7b", "speed/gpu_h200_first")
def step_7b(found: Found, measured: Found) -> str:
    """A row an optimizer, a column a way to hold gradients."""
    peaks = {
        (row["method"], row["tokens"]): row["peak_bytes"]
        for row in measured["limited"].values()
    }
    totals: dict[str, dict[str, str]] = {}
    for row in found["rows"]:
        name = row["method"].partition("(")[0]
        cells = totals.setdefault(name, {})
        cells[way(row)] = gb(row["compiler"]["total"])
        tokens = int(row["setting"].split()[2])  # of "1 x 2048 tokens, ..."
        if way(row) == LAYERWISE and (name, tokens) in peaks:
            cells["on"] = gb(peaks[name, tokens])
    ways = "all", NEVER, LAYERWISE, "on"
    rows = [(f"`{x}`", *(y.get(key, "") for key in ways)) for x, y in totals.items()]
    head = "all gradients at once", "never formed", "a layer at a time"
    return table(("", *head, "the latter on an H200"), rows)


@of("speed/gpu_h200", "speed/training_step_60m")
def front_time(gpu: Found, cpu: Found) -> str:
    """Tokens a second of both at f32 moments, and as a share of AdamW's."""
    runs = {
        (row["model"], row["tokens"], row["method"], row["never"]): row
        for row in gpu["training"].values()
        if not row["remat"]
    }
    ways = (ADAMW_F32, False), (GALORE, False), (GALORE, True)
    rows = []
    for size, tokens in dict.fromkeys(key[:2] for key in runs):
        if not all((size, tokens, *way) in runs for way in ways):
            continue
        rates = [runs[size, tokens, *way]["tokens_per_second"] for way in ways]
        rows.append((f"H200: {model(size)}, bf16, {tokens:,} a step", *_rates(rates)))
    names = "optax.adamw", "galore_optax"
    rates = [cpu["rows"][name]["tokens_per_second"] for name in names]
    title = "two CPU cores: 60M, f32, 256 a step, `galore(optax.adam)`, no refresh"
    rows.append((title, *_rates(rates), ""))
    head = "`optax.adamw`", "`galore_adamw`", "`galore_adamw`, never formed"
    return table(("tokens a second", *head), rows)


def _rates(rates: list[float]) -> list[str]:
    first, *others = rates
    return [f"{first:,.0f}", *(f"{x:,.0f} ({x / first:.0%})" for x in others)]


@of("training/pretraining_1m")
def front_quality(found: Found) -> str:
    rows = [
        (
            MOMENTUM.get(name, name),
            mean_and_deviation(found["rows"][name]["perplexities"]),
            f"{found['rows'][name]['bf16_bytes']['states'] / 1e6:.2f} MB",
        )
        for name in METHODS
    ]
    return table(("", "perplexity", "optimizer state, 16 bits a number"), rows)


@of(
    "training/pretraining_1m",
    "training/llama_9m",
    "training/gpu_h200_epoch_60m",
    "training/finetuning",
)
def learning_rates(tuned: Found, small: Found, epoch: Found, encoder: Found) -> str:
    """The best rates that were tried, of both kinds of leaves."""
    best = {
        name: min(rows, key=lambda row: row["losses"][-1])
        for name in NAMES
        if (rows := [x for x in epoch["rows"].values() if x["method"] == name])
    }
    rates = encoder["learning_rates"]
    fine = (rates["full"], 1.0), (rates["galore"], SCALE_MINILM)
    runs = {
        "1.3M from scratch, f32": [_pair(tuned["rows"][x], "ratio") for x in NAMES],
        "9M from scratch, f32": [
            _pair(small["runs"][x], "matrix_rate", SCALE) for x in NAMES
        ],
        "60M from scratch, bf16": [_pair(best[x], "ratio") for x in NAMES],
        "MiniLM fine-tuned, f32": fine,
    }
    rows = [
        (run, name, f"{rate:g}", f"{rate * ratio:g}")
        for run, pairs in runs.items()
        for name, (rate, ratio) in zip(NAMES, pairs, strict=True)
    ]
    head = "run", "optimizer", "rate of what is not projected", "of matrices"
    return table(head, rows)


def _pair(row: Found, ratio: str, default: float = 1.0) -> tuple[float, float]:
    return row["learning_rate"], row.get(ratio, default)


@of("training/pretraining_1m")
def rates_from_scratch(found: Found) -> str:
    """Losses of seed 0 by rate, matrices at a share of it."""
    grids = {
        f"{name}, {ratio}": losses
        for name in NAMES
        for ratio, losses in found["rows"][name]["grid"].items()
    }
    return _grid(grids)


@of("training/finetuning", "training/finetuning_llama")
def rates_fine_tuning(encoder: Found, llama: Found) -> str:
    """Losses by rate, of both models."""
    methods = {"full": "AdamW", "galore": f"GaLore, `scale={SCALE_MINILM:g}`"}
    methods |= {"lora": "LoRA"}
    grids = {
        f"MiniLM, CoLA: {methods[name]}": losses
        for name, losses in encoder["grid_validation_loss"].items()
    }
    methods = {"adamw": "AdamW", "galore": "GaLore, `scale=1`", "lora": "LoRA"}
    for run in llama["runs"].values():
        row = grids.setdefault(f"SmolLM2-135M: {methods[run['method']]}", {})
        row[f"{run['rate']:g}"] = run["loss"]
    return _grid(grids)


def _grid(grids: dict[str, Found]) -> str:
    """A row a method, a column a rate."""
    rates = sorted({float(x) for losses in grids.values() for x in losses})
    rows = [(name, *_at(losses, rates)) for name, losses in grids.items()]
    return table(("validation loss at rate", *(f"{rate:g}" for rate in rates)), rows)


def _at(losses: Found, rates: list[float]) -> list[str]:
    """A cell a rate, empty where it was not tried; the least of several losses bold."""
    found = {float(rate): loss for rate, loss in losses.items()}
    cells = {rate: f"{loss:.3f}" for rate, loss in found.items()}
    if len(found) > 1:
        best = min(found, key=lambda rate: found[rate])
        cells[best] = f"**{cells[best]}**"
    return [cells.get(rate, "") for rate in rates]
