# SPDX-License-Identifier: Apache-2.0
"""Sentences of README and docs whose numbers come from `results/`, and how."""

import json
import math
from typing import Any

from benchmarks.lib.cells import Load, gb
from benchmarks.lib.claim import README, Claim
from benchmarks.lib.tables import EIGHT_BIT_7B, compiler_row
from benchmarks.speed import speed_claims
from benchmarks.training import ablation_claims, finetuning_claims, training_claims
from benchmarks.why import why_claims
from galore_optax import memory

LLAMA, MEMORY = "examples/llama/README.md", "docs/memory.md"


def _energies(load: Load) -> list[float]:
    found = load("why/captured_energy_gap50")["methods"]
    default, f32 = "power(), the default", "power(product_dtype=float32)"
    names = default, f32, "power(steps=1)", "randomized()"
    return [found[name][key] for name in names for key in ("least", "mean")]


def _seed_spread(load: Load) -> float:
    losses = load("training/demo_seeds")["final_validation_loss"]["GaLore, default"]
    return max(losses) - min(losses)


def _versions(load: Load) -> list[float]:
    """Least and largest loss of the demo's GaLore run, f32, seed 0."""
    found = [
        load("training/eight_bit")["f32"]["loss"],
        load("training/projector_bits")["runs"]["float32"]["loss"],
        load("training/demo_seeds")["final_validation_loss"]["GaLore, default"][0],
    ]
    return [min(found), max(found)]


def _head_share(model: str) -> float:
    """Share of a model's parameters in embedding and head."""
    config = json.loads(memory.config_path(model).read_text())
    vocab, width = config["vocab_size"], config["hidden_size"]
    layer = 4 * width**2 + 3 * width * config["intermediate_size"] + 2 * width
    layers = config["num_hidden_layers"] * layer + width
    return 2 * vocab * width / (2 * vocab * width + layers)


def _corpora(load: Load) -> list[float]:
    found = load("training/corpus_size")
    prose, core = (found["corpora"][name] for name in ("prose", "core"))
    sizes = prose["bytes"] / 1e6, core["bytes"] / 1e6
    return [*sizes, core["tokens"] / 1e6, found["vocab"]]


def _row_7b(load: Load, setting: str) -> Any:
    return compiler_row(load, *EIGHT_BIT_7B, setting)


def _off(load: Load, name: str) -> list[float]:
    """Compiler's total over the estimate, less one, in per cent, by row."""
    rows = load(name)["rows"]
    return [100 * (1 / (1 + row["total_relative"]) - 1) for row in rows]


def _worst_but_adafactor(load: Load) -> int:
    rows = load("memory/plan_vs_compiler")["rows"]
    shares = [r["total_relative"] for r in rows if "adafactor(" not in r["method"]]
    return max(5, math.ceil(100 * max(map(abs, shares))))


def _v5e(load: Load) -> list[float]:
    *near, third, worst = sorted(_off(load, "memory/plan_vs_compiler_v5e"), key=abs)
    return [max(5, math.ceil(max(map(abs, near)))), third, worst]


def _paper_states(load: Load) -> list[float]:
    rows = load("memory/plan_paper")["models"]
    below = [-100 * row["galore_state"]["relative"] for row in rows]
    return [min(below), max(below)]


def _totals_7b(load: Load) -> list[float]:
    found = load("memory/plan_paper")["7b_8bit"]["galore_total"]
    keys = "one byte a moment, projectors in bf16", "galore_optax, galore_adamw8bit"
    return [found[key]["formula"] for key in keys]


ACCUMULATED = "1 x 256 tokens, 4 micro-batches, bfloat16, remat, layerwise"

CLAIMS = [
    *ablation_claims.CLAIMS,
    *finetuning_claims.CLAIMS,
    *speed_claims.CLAIMS,
    *training_claims.CLAIMS,
    *why_claims.CLAIMS,
    Claim(
        README,
        "The demo's LLaMA, {:.1f} million parameters in f32",
        lambda load: [load("memory/state_bytes")["optax.adamw(lr)"] / 8e6],
    ),
    Claim(
        README,
        "a zero point each: {:.2f} or {:.2f} bytes an entry",
        lambda load: [
            load("training/projector_bits")["errors"][f"{dtype}, blocks of 64"][
                "bytes_an_entry"
            ]
            for dtype in ("int8", "int4")
        ],
    ),
    Claim(
        README,
        "One seed, in both tables: differences of {:.2f} are within what seeds make."
        " The same f32 run gave {:.3f} to {:.3f} under different versions of the"
        " library.",
        lambda load: [_seed_spread(load), *_versions(load)],
    ),
    Claim(
        README,
        "The gradients of a 7B model take {:.1f} GB",
        lambda load: [
            _row_7b(load, "1 x 256 tokens, bfloat16, remat")["estimate"]["weights"]
            / 1e9
        ],
    ),
    Claim(
        README,
        "the default at least {:.4f}, {:.4f} on average, and with products in f32"
        " {:.4f} and {:.4f}; one power step {:.4f} and {:.4f}; randomized {:.4f} and"
        " {:.4f}.",
        _energies,
    ),
    Claim(
        README,
        "at a quarter, which is GaLore's scale, its best on the grid was {:.3f}.",
        lambda load: [
            min(load("training/demo_seeds")["grid"]["AdamW, matrices at 0.25"].values())
        ],
    ),
    Claim(
        LLAMA,
        "messages, {:.0f} MB. `--corpus core` adds English classics, which need npm:"
        " {:.0f} MB, {:.1f} million tokens with the {:,} entries",
        _corpora,
    ),
    Claim(
        LLAMA,
        "At this size {:.0f} % of the parameters are embedding and head",
        lambda load: [100 * _head_share("9m")],
    ),
    Claim(
        LLAMA,
        "450 steps of 16 sequences of 256 tokens ({:.1f} million tokens",
        lambda load: [load("training/llama_9m")["runs"]["GaLore"]["tokens"] / 1e6],
    ),
    Claim(
        MEMORY,
        "Within {} % in total in every row.",
        lambda load: [_worst_but_adafactor(load)],
    ),
    Claim(
        MEMORY,
        "four totals lie within {} %, one without remat is {:.0f} % above the estimate,"
        " and `galore_adamw8bit` is {:.0f} % above it",
        _v5e,
    ),
    Claim(
        MEMORY,
        "Four micro-batches of 256 tokens take {}: sums of coordinates in f32 are"
        " {:.1f} GB of it.",
        lambda load: [
            gb(_row_7b(load, ACCUMULATED)["compiler"]["total"]),
            4 * _row_7b(load, ACCUMULATED)["estimate"]["second moments"] / 1e9,
        ],
    ),
    Claim(
        MEMORY,
        "the printed figures are {:.0f} to {:.0f} % below the formula",
        _paper_states,
    ),
    Claim(
        MEMORY,
        "the formula gives {:.2f} GB, and `galore_adamw8bit` with its scales {:.2f} GB",
        _totals_7b,
    ),
]

# Versions, settings, figures of the paper and of packages, by the words around them.
NOT_MEASURED = [
    *training_claims.NOT_MEASURED,
    "Python 3.11 or later, jax 0.10 or later, optax 0.2.8 or later",
    "| scale | 0.25 in the recipes | 1.0 | 0.25 |",
    "Apache-2.0",
    "arXiv 2403.03507",
    "galore-torch 1.0",
    "384 wide | 22.6 million | one package, 84 MB",
    "size | 108.9 million | five packages, 405 MB",
    "GaLore (253 MB with the weights) beside LoRA (257 MB)",
    "8,530 sentences of Pang",
    "rates of published recipes belong to 0.25",
    "train in 24 GB",
    "The 18 GB of the 7B model",
    "their gradient at 2,048",
    "AdamW 0.001, 0.002 and 0.004",
    "GaLore 0.0025, 0.005 and 0.01",
]
