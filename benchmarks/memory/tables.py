# SPDX-License-Identifier: Apache-2.0
"""Tables of what is held in memory, and of what compilers make of a step."""

import collections
from collections.abc import Iterable
from typing import Any

from benchmarks.lib.tables import gb, model, of, signed, table

Found = dict[str, Any]
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


@of("memory/state_bytes")
def state_bytes(found: Found) -> str:
    rows = [(f"`{k}`", f"{found[k]:,} bytes", note) for k, note in SPELLINGS.items()]
    return table(("spelling", "optimizer state", ""), rows)


@of("memory/state_per_device")
def state_per_device(found: Found) -> str:
    """GB on each device; the rows of the two ways to split weights are much alike."""
    splits = {"hidden": "kept", "width": "projected"}
    devices = list(found["rows"][0]["devices"])
    rows = [
        (
            f"`{row['optimizer']}`",
            splits[row["split"]],
            *(f"{row['devices'][n]['bytes'] / 1e9:.2f}" for n in devices),
        )
        for row in found["rows"]
    ]
    return table(("GB on each of", "axis split", *devices), rows)


@of("memory/many_devices")
def many_devices(found: Found) -> str:
    """GB on each chip."""
    rows = [
        (
            str(row["chips"]),
            f"`{row['optimizer']}`",
            row["step"],
            gb(row["arguments"]),
            gb(row["temporaries"]),
            gb(row["arguments"] + row["temporaries"] + row["not_donated"]),
            *(gb(row["collectives"].get(x, 0)) for x in ("all-gather", "all-to-all")),
            f"{row['compile_seconds']:.0f}",
        )
        for row in found["rows"]
    ]
    head = "chips", "GB on each", "step", "arguments", "temporaries", "total"
    sent = "gathered", "dealt out", "s to compile"
    return table((*head, *sent), rows)


@of("memory/weak_scaling")
def weak_scaling(found: Found) -> str:
    """What is asked of each device, a column a number of devices."""
    quantities = {
        "state, GB": lambda x: f"{x['state_bytes'] / 1e9:.2f}",
        "products, TFLOP a step": lambda x: f"{x['product_flops'] / 1e12:.2f}",
        "projectors gathered, GB a step": lambda x: f"{x['gathered_bytes'] / 1e9:.2f}",
        "dealt out, GB a refresh": lambda x: f"{x['dealt_bytes'] / 1e9:.2f}",
        "matrices renewed": lambda x: str(x["matrices"]),
    }
    rows = [(name, *map(show, found["rows"])) for name, show in quantities.items()]
    return table(("each of", *(str(x["devices"]) for x in found["rows"])), rows)


@of("memory/step_memory")
def step_memory(found: Found) -> str:
    """What an optimizer step holds; gradients are in the total only."""
    rows = [
        (
            f"{model(row['model'])}, `{row['optimizer']}`",
            "" if row["rank"] is None else str(row["rank"]),
            *(f"{row[x] / 1e9:.3f}" for x in ("weights", "state", "temporaries")),
            f"{row['total'] / 1e9:.3f}",
        )
        for row in found["rows"]
    ]
    head = "GB", "rank", "weights", "state", "temporaries", "total"
    return table(head, rows)


@of("memory/plan_vs_compiler")
@of("memory/plan_vs_compiler_v5e", name="plan_vs_compiler_v5e")
@of("memory/plan_vs_compiler_tied", name="plan_vs_compiler_tied")
def plan_vs_compiler(found: Found) -> str:
    rows = [
        (
            f"{model(row['model'])} {row['method']}",
            row["setting"],
            gb(row["compiler"]["total"]),
            gb(row["compiler"]["temporaries"]),
            signed(row["total_relative"]),
            signed(row["temporaries_relative"]),
        )
        for row in found["rows"]
    ]
    head = "model, method", "setting", "compiler", "of it temporaries"
    return table((*head, "estimate, total", "temporaries"), rows)


EIGHT_BIT = "galore_adamw8bit(rank=1024)"
STEPS_7B = {  # method, tokens, whether layer by layer
    "`adamw`": ("adamw", 256, False),
    "`galore_adamw8bit`": (EIGHT_BIT, 256, False),
    "`galore_adamw8bit`, layerwise": (EIGHT_BIT, 256, True),
    "`galore_adamw8bit`, layerwise ": (EIGHT_BIT, 2048, True),
}


def row_7b(found: Found, method: str, tokens: int, layerwise: bool) -> Found:
    """The row of one such step of LLaMA-7B."""
    return _row_7b(found, method, tokens, ", layerwise" * layerwise)


def _row_7b(found: Found, method: str, tokens: int, how: str) -> Found:
    wanted = "7b", method, f"1 x {tokens} tokens, bfloat16, remat{how}"
    rows = {(r["model"], r["method"], r["setting"]): r for r in found["rows"]}
    return rows[wanted]


@of("memory/plan_vs_compiler")
def layerwise_7b(found: Found) -> str:
    rows = []
    for name, (method, tokens, layerwise) in STEPS_7B.items():
        total = gb(row_7b(found, method, tokens, layerwise)["compiler"]["total"])
        shown = f"**{total}**" if layerwise else total
        rows.append((name.strip(), f"{tokens:,}", shown))
    return table(("", "tokens", "compiler's total"), rows)


TERMS = {
    "weights": "weights",
    "projectors": "projectors, bf16",
    "first moments": "first moments, 8 bits",
    "second moments": "second moments, 8 bits",
    "scales": "scales",
    "gradients": "gradients, or coordinates",
    "activations": "inputs of layers, logits",
    "workspace": "workspace",
}


@of("memory/plan_vs_compiler")
def plan_7b(found: Found) -> str:
    steps = [row_7b(found, *key) for key in list(STEPS_7B.values())[1:]]
    steps.append(_row_7b(found, EIGHT_BIT, 256, ", never formed"))

    def cells(values: Iterable[float]) -> list[str]:
        return [f"{v / 1e9:.2f}" if v >= 5e6 else "" for v in values]

    rows = [
        (name, *cells(step["estimate"][key] for step in steps))
        for key, name in TERMS.items()
    ]
    for who in ("estimate", "compiler"):
        rows.append((f"total, {who}", *cells(step[who]["total"] for step in steps)))
    heads = "256 tokens, all gradients", "256, layerwise", "2,048, layerwise"
    return table(("", *heads, "256, never formed"), rows)


@of("memory/plan_paper")
def plan_paper(found: Found) -> str:
    rows = [
        (
            model(row["model"]),
            str(row["rank"]),
            *_printed(row["adam_total"]),
            *_printed(row["galore_total"]),
            signed(row["galore_state"]["relative"]),
        )
        for row in found["models"]
    ]
    adam = _printed(found["7b_8bit"]["adam_total"])
    for name, total in found["7b_8bit"]["galore_total"].items():
        rows.append((f"7B, {name}", "1024", *adam, *_printed(total), ""))
    head = "", "rank", "Adam, printed", "by formula", "", "GaLore, printed"
    return table((*head, "by formula", "", "its states alone"), rows)


def _printed(total: dict[str, float]) -> tuple[str, str, str]:
    paper, formula = f"{total['paper']:.2f}", f"{total['formula']:.2f}"
    return paper, formula, signed(total["relative"])


@of("memory/compiled_step")
@of("memory/compiled_step_before", name="compiled_step_before")
def compiled_step(found: Found) -> str:
    rows = [
        (
            name,
            *(str(row[key]) for key in ("kernels", "products", "conditionals")),
            _loops(row["loops"]),
            str(sum(x["trips"] is None for x in row["loops"])),
            str(row["f32_arrays_of_leaf_size"]),
            str(row["bf16_arrays_of_leaf_size"]),
            gb(row["temporaries"]),
        )
        for name, row in found["rows"].items()
    ]
    head = "target, optimizer, program", "kernels", "products", "conditionals"
    loops = "outer loops of turns", "loops that ask the host"
    return table((*head, *loops, "f32 arrays of a leaf", "bf16", "temporaries"), rows)


def _loops(loops: list[Found]) -> str:
    """How many outer loops have how many turns."""
    turns = collections.Counter(x["trips"] or "?" for x in loops if not x["depth"])
    return ", ".join(f"{count} of {trips}" for trips, count in turns.items())


GRADIENTS = {
    "never": "never formed",
    "formed": "all formed",
    "layerwise": "a layer's at a time",
}


@of("memory/never_formed_bytes")
def never_formed_bytes(found: Found) -> str:
    rows = []
    for row in found["rows"]:
        case, products = row["case"], row.get("gradient_products")
        rows.append(
            (
                f"`{case['method']}`",
                GRADIENTS[case["gradients"]],
                f"{case['tokens']:,}",
                str(case["accumulation"]),
                _refresh_of(case),
                gb(row["total"]),
                gb(row["temporaries"]),
                "" if products is None else str(products),
            )
        )
    head = "optimizer", "gradients", "tokens", "micro-batches", "refresh in it"
    sizes = "total", "of it temporaries", "products that make a gradient"
    return table((*head, *sizes), rows)


def _refresh_of(case: dict[str, Any]) -> str:
    if not case["refresh"]:
        return "no"
    return f"in {case['shares']} shares" if case["shares"] > 1 else "yes"


@of("memory/never_formed_wire")
def never_formed_wire(found: Found) -> str:
    rows = [
        (
            f"{model(row['model'])}, {row['dtype']}",
            str(row["rank"]),
            *(f"{row[kind] / 1e6:,.1f}" for kind in ("formed", "never")),
            f"{row['formed'] / row['never']:.2f}",
            *(_in_program(row, kind) for kind in ("formed", "never")),
        )
        for row in found["rows"]
    ]
    head = "weights", "rank", "formed, MB", "never, MB", "times fewer"
    return table((*head, "formed, in the program", "never, in the program"), rows)


def _in_program(row: Found, kind: str) -> str:
    return f"{row['in_program'][kind] / 1e6:,.1f}" if "in_program" in row else ""


@of("memory/never_formed_flops")
def never_formed_flops(found: Found) -> str:
    rows = [
        (
            model(row["model"]),
            str(row["rank"]),
            "yes" if row["remat"] else "no",
            f"{row['adamw']:.3e}",
            *(f"{row[kind] / row['adamw']:.3f}" for kind in ("formed", "never")),
        )
        for row in found["rows"]
    ]
    head = "", "rank", "remat", "`optax.adamw`", "GaLore, formed / adamw"
    return table((*head, "GaLore, never / adamw"), rows)
