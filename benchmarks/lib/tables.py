# SPDX-License-Identifier: Apache-2.0
"""The tables of README and docs, each a function of the results on record."""

import types
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.lib.cells import Load, gb, signed, table
from benchmarks.speed import gpu_tables, speed_tables
from benchmarks.training import training_tables

import demo as demo_program


def demo(load: Load) -> str:
    """As the demo prints it."""
    results = {
        k: types.SimpleNamespace(**row) for k, row in load("training/demo").items()
    }
    lines = demo_program.table(results).splitlines()
    return "\n" + "\n".join(f"    {line}" for line in lines) + "\n"


SPELLINGS = {
    "galore(optax.adamw(lr), rank=64)": "what you want",
    "galore_optax.chain(galore(rank=64), optax.adamw(lr))": (
        "the same; whatever follows `galore` runs inside"
    ),
    "optax.chain(galore(rank=64), optax.adamw(lr))": (
        "trains, saves nothing, and warns"
    ),
    "optax.adamw(lr)": "for comparison",
    "optax.contrib.galore(lr, rank=64)": "leaves scanned layers at full size",
}


def state_bytes(load: Load) -> str:
    found = load("memory/state_bytes")
    rows = [(f"`{k}`", f"{found[k]:,} bytes", note) for k, note in SPELLINGS.items()]
    return table(("spelling", "optimizer state", ""), rows)


def eight_bit(load: Load) -> str:
    found, names = load("training/eight_bit"), {"f32": "f32"}
    names |= {code: f"`codes.{code}()`" for code in ("dynamic", "companded")}
    exact = found["f32"]["loss"]
    rows = [
        (
            name,
            _loss(found[key]["loss"], exact),
            f"{found[key]['tokens_per_second']:,.0f}",
            f"{found[key]['state_bytes']:,} bytes",
        )
        for key, name in names.items()
    ]
    head = "moments", "final validation loss", "tokens/s", "optimizer state"
    return table(head, rows)


def _loss(loss: float, exact: float) -> str:
    return f"{loss:.3f}" + (
        f" ({signed(loss / exact - 1, 2)})" if loss != exact else ""
    )


def projector_bits(load: Load) -> str:
    found = load("training/projector_bits")
    runs, errors = found["runs"], found["errors"]
    exact, rows = runs["float32"]["loss"], []
    for key, name in {
        "float32": "f32",
        "bfloat16": "bf16",
        "int8": "",
        "int4": "",
    }.items():
        error = errors.get(f"{key}, blocks of 64")
        cells = (
            (f"{error['mean_relative']:.3f}", f"{error['gram_norm']:.3f}")
            if error
            else ("", "")
        )
        size = f"{runs[key]['projector_bytes']:,}"
        rows.append((name or key, _loss(runs[key]["loss"], exact), size, *cells))
    head = "projectors", "final validation loss", "bytes of projectors"
    return table((*head, "relative error of a basis P", "norm of PᵀP - I"), rows)


def compiler_row(load: Load, model: str, method: str, setting: str) -> dict[str, Any]:
    """One row of `plan_vs_compiler`."""
    rows = load("memory/plan_vs_compiler")["rows"]
    wanted = (model, method, setting)
    return next(r for r in rows if (r["model"], r["method"], r["setting"]) == wanted)


EIGHT_BIT_7B = "7b", "galore_adamw8bit(rank=1024)"
BF16 = "bfloat16, remat"
STEPS_7B = {
    "`adamw`": ("7b", "adamw", f"1 x 256 tokens, {BF16}"),
    "`galore_adamw8bit`": (*EIGHT_BIT_7B, f"1 x 256 tokens, {BF16}"),
    "`galore_adamw8bit`, layerwise": (
        *EIGHT_BIT_7B,
        f"1 x 256 tokens, {BF16}, layerwise",
    ),
    "`galore_adamw8bit`, layerwise ": (
        *EIGHT_BIT_7B,
        f"1 x 2048 tokens, {BF16}, layerwise",
    ),
}


def layerwise_7b(load: Load) -> str:
    rows = []
    for name, key in STEPS_7B.items():
        total = gb(compiler_row(load, *key)["compiler"]["total"])
        tokens = "2,048" if "2048" in key[2] else "256"
        rows.append(
            (name.strip(), tokens, f"**{total}**" if "layerwise" in name else total)
        )
    return table(("", "tokens", "compiler's total"), rows)


def plan_vs_compiler(load: Load) -> str:
    head = "model, method", "setting", "compiler", "of it temporaries"
    rows = [
        (
            f"{row['model'][:-1] + row['model'][-1].upper()} {row['method']}",
            row["setting"],
            gb(row["compiler"]["total"]),
            gb(row["compiler"]["temporaries"]),
            signed(row["total_relative"]),
            signed(row["temporaries_relative"]),
        )
        for row in load("memory/plan_vs_compiler")["rows"]
    ]
    return table((*head, "estimate, total", "temporaries"), rows)


TERMS = {
    "weights": "weights",
    "projectors": "projectors, bf16",
    "first moments": "first moments, 8 bits",
    "second moments": "second moments, 8 bits",
    "scales": "scales",
    "gradients": "gradients",
    "activations": "inputs of layers",
    "workspace": "workspace",
}


def plan_7b(load: Load) -> str:
    rows_7b = [compiler_row(load, *key) for key in list(STEPS_7B.values())[1:]]

    def cells(values: Iterable[float]) -> list[str]:
        return [f"{v / 1e9:.2f}" if v >= 5e6 else "" for v in values]

    rows = [
        (name, *cells(row["estimate"][key] for row in rows_7b))
        for key, name in TERMS.items()
    ]
    rows.append(("total, estimate", *cells(r["estimate"]["total"] for r in rows_7b)))
    rows.append(("total, compiler", *cells(r["compiler"]["total"] for r in rows_7b)))
    heads = "256 tokens, all gradients", "256, layerwise", "2,048, layerwise"
    return table(("", *heads), rows)


def plan_paper(load: Load) -> str:
    found = load("memory/plan_paper")

    def cells(total: dict[str, float], digits: int = 3) -> list[str]:
        paper = f"{total['paper']:.2f}" if digits == 3 else f"{total['paper']:.0f}"
        return [paper, f"{total['formula']:.{digits}f}", signed(total["relative"])]

    rows = [
        (
            row["model"][:-1] + row["model"][-1].upper(),
            str(row["rank"]),
            *cells(row["adam_total"]),
            *cells(row["galore_total"]),
        )
        for row in found["models"]
    ]
    adam, galore = found["7b_8bit"]["adam_total"], found["7b_8bit"]["galore_total"]
    exact = galore["one byte for all states"]
    rows.append(("7B, 8 bit", "1024", *cells(adam, 2), *cells(exact, 2)))
    head = "", "rank", "Adam, printed", "by formula", "", "GaLore, printed"
    return table((*head, "by formula", ""), rows)


TABLES: dict[str, Callable[[Load], str]] = {
    make.__name__: make
    for make in (
        *(demo, state_bytes, eight_bit, projector_bits, layerwise_7b),
        *gpu_tables.ALL,
        *speed_tables.ALL,
        *training_tables.ALL,
        *(plan_vs_compiler, plan_7b, plan_paper),
    )
}
