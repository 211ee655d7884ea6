# SPDX-License-Identifier: Apache-2.0
"""Tables of what was timed."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.lib.cells import Load, table

STEPPED = "optax.adamw", "galore_optax", "optax.contrib.galore"


def _step_rows(size: str, found: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for name in STEPPED:
        row = found[name]
        refresh = "" if name == "optax.adamw" else f"{row['refresh_seconds']:.3f}"
        times = f"{row['compile_seconds']:.2f}", f"{row['steady_seconds']:.3f}"
        state = f"{row['state_bytes']:,}"
        rows.append((f"{size}, `{name}`", *times, refresh, state))
    return rows


STEP_HEAD = "", "compile", "steady step", "refresh", "state bytes"


def optimizer_step(load: Load) -> str:
    sizes = {k: v for k, v in load("speed/optimizer_step").items() if "rank" not in k}
    return table(STEP_HEAD, [r for k, v in sizes.items() for r in _step_rows(k, v)])


def optimizer_step_ranks(load: Load) -> str:
    found = load("speed/optimizer_step")
    sizes = {k if "rank" in k else f"{k}, rank d/4": v for k, v in found.items()}
    sizes = {k: v for k, v in sizes.items() if k.startswith("60M")}
    ranks = sorted(sizes, key=lambda k: sizes[k]["rank"])
    return table(STEP_HEAD, [r for k in ranks for r in _step_rows(k, sizes[k])])


def floor(load: Load) -> str:
    rows = [
        (
            row["curve"].removeprefix("model ").upper(),
            *(f"{1e3 * row['seconds'][name]:.1f}" for name in STEPPED),
            f"{1e3 * row['floor']['galore_optax']:.1f}",
            f"{row['ratio']['galore_optax']:.2f}",
            f"{row['ratio']['optax.adamw']:.2f}",
        )
        for row in load("speed/floor")["points"]
        if row["curve"].startswith("model")
    ]
    head = "", "`optax.adamw`, ms", "`galore_optax`, ms", "`optax.contrib.galore`, ms"
    return table((*head, "our floor, ms", "ours / floor", "adamw / its floor"), rows)


def step_trace(load: Load) -> str:
    rows = [
        (
            f"`{name}`",
            *(f"{1e3 * row[f'{x}_seconds']:.0f}" for x in ("median", "mean")),
            f"{1e3 * row['largest_seconds']:.0f}",
            f"{row['largest_over_median']:.2f}",
        )
        for name, row in load("speed/step_trace")["traces"].items()
    ]
    head = "ms a step", "median", "mean", "largest", "largest / median"
    return table(head, rows)


def against_torch(load: Load) -> str:
    rows = [
        (
            f"{size}, {name}",
            f"{row['steady_seconds']:.3f}",
            f"{row['refresh_seconds']:.3f}" if "galore" in name.lower() else "",
            _over_ours(row["steady_over_ours"]),
        )
        for size, found in load("speed/against_torch").items()
        for name, row in found["rows"].items()
    ]
    return table(("", "steady step, s", "refresh, s", "step / ours (by start)"), rows)


def _over_ours(ratios: Sequence[float]) -> str:
    """The median, and all if they differ."""
    each = ", ".join(f"{x:.2f}" for x in ratios)
    differ = max(ratios) > min(ratios)
    return f"{statistics.median(ratios):.2f}" + (f" ({each})" if differ else "")


def training_step(load: Load) -> str:
    found = load("speed/training_step_60m")["rows"]
    ours = found["galore_optax"]["steady_seconds"]
    rows = [
        (
            f"`{name}`",
            f"{row['steady_seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['steady_seconds'] / ours:.2f}",
        )
        for name, row in found.items()
    ]
    return table(("", "steady step, s", "tokens/s", "step / ours"), rows)


def refresh_7b(load: Load) -> str:
    rows = [
        (
            method,
            f"{row['refresh_seconds']:,.0f} s",
            f"{row['times_faster_than_svd']:.1f}",
            f"{min(row['share_of_exact_energy'].values()):.4f}",
            row["sum"],
        )
        for method, row in load("speed/refresh_7b")["methods"].items()
    ]
    head = "", "a refresh of all", "times faster than SVD", "least energy / exact"
    return table((*head, "the sum"), rows)


def step_memory(load: Load) -> str:
    """What an optimizer step holds; gradients are in the total only."""
    rows = [
        (
            f"{row['model'][:-1]}{row['model'][-1].upper()}, `{row['optimizer']}`",
            "" if row["rank"] is None else str(row["rank"]),
            *(f"{row[x] / 1e9:.3f}" for x in ("weights", "state", "temporaries")),
            f"{row['total'] / 1e9:.3f}",
        )
        for row in load("memory/step_memory")["rows"]
    ]
    head = "GB", "rank", "weights", "state", "temporaries", "total"
    return table(head, rows)


ALL = (
    *(optimizer_step, optimizer_step_ranks, floor, step_trace, against_torch),
    *(training_step, refresh_7b, step_memory),
)
