# SPDX-License-Identifier: Apache-2.0
"""Tables of what was timed on a GPU."""

from typing import Any

from benchmarks.lib.shapes import Shapes
from benchmarks.lib.tables import gb, model, ms, of, table
from benchmarks.memory.tables import EIGHT_BIT, row_7b

Found = dict[str, Any]
CARD, FIRST = "speed/gpu_h200", "speed/gpu_h200_first"
MOMENTS = {"float32": "f32", "bfloat16": "bf16", "int8": "eight bits"}


def _name_and_moments(optimizer: str, dtype: str) -> tuple[str, str]:
    """The name without a word on moments, and these, for weights in `dtype`."""
    name = optimizer.removesuffix(", f32 moments")
    if optimizer == "galore_adamw8bit":
        return f"`{name}`", MOMENTS["int8"]
    wide = optimizer in ("galore_adamw", "optax.adamw, f32 moments")
    return f"`{name}`", "f32" if wide else MOMENTS[dtype]


def _share(part: float | None) -> str:
    """Of a peak, where it is known."""
    return "" if part is None else f"{100 * part:.1f} %"


def _refreshes(row: dict[str, Any]) -> tuple[str, str]:
    """Of what has any."""
    if "adamw" in row["optimizer"].lower() and "galore" not in row["optimizer"]:
        return "", ""
    found = row.get("first_refresh_seconds"), row["refresh_seconds"]
    return ms(found[0]), ms(found[1])


@of(CARD)
def gpu_steps(found: Found) -> str:
    return _gpu_steps(found)


@of(FIRST)
def gpu_steps_first(found: Found) -> str:
    return _gpu_steps(found)


def _gpu_steps(found: Found) -> str:
    rows = []
    for row in found["steps"].values():
        layout = "stacked" if row["stacked"] else "one leaf a matrix"
        setting = f"{model(row['model'])}, {MOMENTS[row['dtype']]}, {layout}"
        times = ms(row["steady_seconds"]), *_refreshes(row)
        state = gb(row["state_bytes"])
        what = _name_and_moments(row["optimizer"], row["dtype"])
        rows.append((setting, *what, *times, state))
    for row in found.get("torch", {}).values():
        if "optimizer" in row:
            setting = f"{model(row['model'])}, f32, torch {row['torch']}"
            times = ms(row["steady_seconds"]), *_refreshes(row)
            rows.append((setting, row["optimizer"], "f32", *times, ""))
    head = "weights, layout", "", "moments", "step, ms", "first refresh, ms"
    return table((*head, "refresh, ms", "state"), rows)


@of(FIRST, "memory/plan_vs_compiler")
def gpu_limited(found: Found, plans: Found) -> str:
    def estimate(tokens: int) -> float:
        return row_7b(plans, EIGHT_BIT, tokens, True)["estimate"]["total"]

    rows = [
        (
            f"{row['tokens']:,}",
            gb(row["limit_bytes"]),
            gb(estimate(row["tokens"])),
            gb(row["peak_bytes"]),
            f"{row['tokens_per_second']:,.0f}",
        )
        for row in found["limited"].values()
    ]
    head = "tokens a step", "limit", "estimate", "peak"
    return table((*head, "tokens/s"), rows)


@of(CARD)
def gpu_training(found: Found) -> str:
    rows = [
        (
            f"{model(row['model'])}, {row['tokens']:,} tokens a step",
            *_method_and_moments(row),
            f"{row['tokens_per_second']:,.0f}",
            ms(row["steady_seconds"]),
            ms(row["refresh_seconds"]) if "galore" in row["method"] else "",
            _share(row["flop_utilisation"]),
            gb(row["peak_bytes"]),
        )
        for row in found["training"].values()
    ]
    head = "bf16 weights", "", "moments", "tokens/s", "step, ms", "refresh, ms"
    return table((*head, "of the card's peak", "peak memory"), rows)


def _method_and_moments(row: dict[str, Any]) -> tuple[str, str]:
    name, moments = _name_and_moments(row["method"], "bfloat16")
    return name + (", gradients never formed" if row["never"] else ""), moments


@of(CARD)
def gpu_never_formed(found: Found) -> str:
    rows = [
        (model(row["model"]), MOMENTS[row["dtype"]], f"{max(row['errors']):.1e}")
        for row in found["never"].values()
    ]
    return table(("model", "weights", "largest error of a leaf"), rows)


@of(FIRST)
def gpu_training_first(found: Found) -> str:
    rows = [
        (
            f"{model(row['model'])}, {row['tokens']:,} tokens a step",
            *_name_and_moments(row["method"], "bfloat16"),
            f"{row['tokens_per_second']:,.0f}",
            _share(row["flop_utilisation"]),
            gb(row["peak_bytes"]),
        )
        for row in found["training"].values()
    ]
    head = "bf16 weights", "", "moments", "tokens/s", "of the card's peak"
    return table((*head, "peak memory"), rows)


@of(FIRST)
def gpu_probes(found: Found) -> str:
    rows = [
        (
            f"`{row['method']}`",
            "{} × {}".format(*row["shape"]),
            MOMENTS[row["dtype"]],
            f"{row['orthonormality']:.1e}",
            f"{row['energy']:.4f}",
        )
        for row in found["probes"].values()
        if "orthonormality" in row
    ]
    head = "", "gradient", "in", "largest entry of PᵀP − I", "captured energy"
    return table(head, rows)


@of(FIRST)
def gpu_refresh(found: Found) -> str:
    """Seconds of one basis by shape, and of all of a 7B model's."""
    counts = Shapes.load("7b").matrices()
    by_method: dict[str, dict[tuple[int, int], float]] = {}
    for row in found["probes"].values():
        m, n = row["shape"]
        if (m, n) in counts and "refresh_seconds" in row:
            times = by_method.setdefault(row["method"], {})
            times[m, n] = row["refresh_seconds"]
    rows = []
    for method, times in by_method.items():
        complete = times.keys() == counts.keys()
        total = sum(counts[shape] * each for shape, each in times.items())
        cells = (ms(times.get(shape)) for shape in counts)
        rows.append((method, *cells, f"{total:.1f}" if complete else ""))
    head = (f"{m} × {n}, ms" for m, n in counts)
    return table(("", *head, "all of 7B, s"), rows)


@of("training/gpu_h200_epoch_60m")
def gpu_epoch(found: Found) -> str:
    rows = [
        (
            row["method"],
            MOMENTS[found["moments"][row["method"]]],
            f"{row['learning_rate']:g}",
            f"{row['ratio']:g}",
            f"{row['losses'][-1]:.2f}",
            f"{row['state_bytes']:,}",
        )
        for row in found["rows"].values()
    ]
    head = "", "moments", "learning rate", "of matrices", "validation loss"
    return table((*head, "state bytes"), rows)
