# SPDX-License-Identifier: Apache-2.0
"""Tables of what was timed."""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.lib.tables import model, of, signed, table

OURS, ADAMW, THEIRS = "galore_optax", "optax.adamw", "optax.contrib.galore"
STEPPED = ADAMW, OURS, THEIRS
STEP_HEAD = "", "compile", "steady step", "refresh", "state bytes"
Found = dict[str, Any]


@of("speed/optimizer_step")
def optimizer_step(found: Found) -> str:
    sizes = {name: rows for name, rows in found.items() if "rank" not in name}
    return steps(sizes)


@of("speed/optimizer_step")
def optimizer_step_ranks(found: Found) -> str:
    named = {k if "rank" in k else f"{k}, rank d/4": v for k, v in found.items()}
    ranks = [k for k in named if k.startswith("60M")]
    return steps({k: named[k] for k in sorted(ranks, key=lambda k: named[k]["rank"])})


def steps(sizes: Found) -> str:
    rows = [
        (
            f"{size}, `{name}`",
            f"{row['compile_seconds']:.2f}",
            f"{row['steady_seconds']:.3f}",
            "" if name == ADAMW else f"{row['refresh_seconds']:.3f}",
            f"{row['state_bytes']:,}",
        )
        for size, found in sizes.items()
        for name, row in found.items()
        if name in STEPPED
    ]
    return table(STEP_HEAD, rows)


@of("speed/family_step")
def family_step(found: Found) -> str:
    rows = [
        (
            f"`{name}`" if "alone" not in name else name,
            f"{1e3 * row['steady_seconds']:.0f}",
            *(f"{row['over'][base]:.2f}" for base in (ADAMW, "galore_adamw")),
            f"{row['compile_seconds']:.1f}",
            "" if "alone" in name else f"{row['state_bytes'] / 1e6:,.0f} MB",
        )
        for name, row in found["rows"].items()
    ]
    head = "", "step, ms", "/ `optax.adamw`", "/ `galore_adamw`", "compile, s", "state"
    return table(head, rows)


@of("speed/floor")
def floor(found: Found) -> str:
    rows = [
        (
            row["curve"] if row["curve"].startswith("model") else _place(row),
            *(f"{1e3 * row['seconds'][name]:.1f}" for name in STEPPED),
            f"{1e3 * row['floor'][OURS]:.1f}",
            *(f"{row['ratio'][name]:.2f}" for name in (OURS, ADAMW)),
            f"{row['seconds'][OURS] / row['seconds'][ADAMW]:.1f}",
        )
        for row in found["points"]
    ]
    head = "", "`optax.adamw`, ms", "`galore_optax`, ms", "`optax.contrib.galore`, ms"
    ratios = "ours / floor", "adamw / its floor", "ours / adamw"
    return table((*head, "our floor, ms", *ratios), rows)


def _place(row: Found) -> str:
    return f"{row['curve']}: {row['x']}"


@of("speed/step_trace")
def step_trace(found: Found) -> str:
    rows = [
        (
            f"`{name}`",
            *(f"{1e3 * row[f'{x}_seconds']:.0f}" for x in ("median", "mean")),
            f"{1e3 * row['largest_seconds']:.0f}",
            f"{row['largest_over_median']:.2f}",
        )
        for name, row in found["traces"].items()
    ]
    head = "ms a step", "median", "mean", "largest", "largest / median"
    return table(head, rows)


@of("speed/against_torch")
def against_torch(found: Found) -> str:
    rows = [
        (
            f"{size}, {name}",
            f"{row['steady_seconds']:.3f}",
            f"{row['refresh_seconds']:.3f}" if "galore" in name.lower() else "",
            _over_ours(row["steady_over_ours"]),
        )
        for size, started in found.items()
        for name, row in started["rows"].items()
    ]
    return table(("", "steady step, s", "refresh, s", "step / ours (by start)"), rows)


def _over_ours(ratios: Sequence[float]) -> str:
    """The median, and all if they differ."""
    each = ", ".join(f"{x:.2f}" for x in ratios)
    differ = max(ratios) > min(ratios)
    return f"{statistics.median(ratios):.2f}" + (f" ({each})" if differ else "")


@of("speed/training_step_60m")
def training_step(found: Found) -> str:
    ours = found["rows"][OURS]["steady_seconds"]
    rows = [
        (
            f"`{name}`",
            f"{row['steady_seconds']:.3f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['steady_seconds'] / ours:.2f}",
        )
        for name, row in found["rows"].items()
    ]
    return table(("", "steady step, s", "tokens/s", "step / ours"), rows)


@of("speed/refresh_7b")
def refresh_7b(found: Found) -> str:
    rows = [
        (
            method,
            f"{row['refresh_seconds']:,.0f} s",
            f"{row['first_refresh_seconds']:,.0f} s",
            f"{row['times_faster_than_svd']:.1f}",
            f"{min(row['share_of_exact_energy'].values()):.4f}",
            row["sum"],
        )
        for method, row in found["methods"].items()
    ]
    head = "", "a refresh of all", "the first", "times faster than SVD"
    return table((*head, "least energy / exact", "the sum"), rows)


@of("speed/blas_threads")
def blas_threads(found: dict[str, float]) -> str:
    alone = found["products alone"]
    start, end = "products behind ", ", less its own"
    rows = [
        (
            name.removeprefix(start).removesuffix(end),
            f"{x:.2f}",
            signed(x / alone - 1, 0),
        )
        for name, x in found.items()
        if name.startswith(start)
    ]
    return table((f"products alone: {alone:.2f} ms", "behind it, ms", ""), rows)


@of("speed/trace_time")
def trace_time(found: Found) -> str:
    """Seconds, and how many times those of Optax's."""
    rows = [
        (f"`{name}`", what, f"{cell['seconds']:.3f}", *_over(cell["over"]))
        for name, cells in found["optimizers"].items()
        for what, cell in cells.items()
    ]
    return table(("", "", "seconds", "/ `optax.adamw`", "/ contrib's"), rows)


@of("speed/trace_time")
def init_time(found: Found) -> str:
    """Seconds of `jit(init)` by stage."""
    rows = [
        (f"`{name}`", *(f"{x:.2f}" for x in (*cell.values(), sum(cell.values()))))
        for name, cell in found["init"].items()
    ]
    return table(("`jit(init)`, 7B, seconds", "trace", "lower", "compile", "all"), rows)


def _over(ratios: dict[str, float]) -> list[str]:
    return [f"{ratios[x]:.2f}" if x in ratios else "" for x in (ADAMW, THEIRS)]


@of("speed/never_formed")
def never_formed_speed(found: Found) -> str:
    rows = []
    for case in found["rows"]:
        made = case["rows"]
        speeds = {name: row["tokens_per_second"] for name, row in made.items()}
        rows.append(
            (
                *_never_formed_case(case),
                *(f"{speeds[name]:,.0f}" for name in (ADAMW, "formed", "never")),
                *(f"{speeds[k] / speeds[ADAMW]:.3f}" for k in ("formed", "never")),
                *(f"{made[k]['refresh_seconds']:.2f}" for k in ("formed", "never")),
                f"{_compile_ratio(made):.2f}",
            )
        )
    head = (
        "",
        "entries",
        "tokens",
        "remat",
        "`optax.adamw`, tokens/s",
        "formed",
        "never",
    )
    over = "formed / adamw", "never / adamw", "refresh, formed, s", "never, s"
    return table((*head, *over, "compile, never / formed"), rows)


def _never_formed_case(case: Found) -> tuple[str, ...]:
    depth = f", {case['layers']} layer" if case["layers"] else ""
    numbers = (f"{case[key]:,}" for key in ("vocab", "tokens"))
    return f"{model(case['model'])}{depth}", *numbers, "yes" if case["remat"] else "no"


def _compile_ratio(made: Found) -> float:
    return made["never"]["compile_seconds"] / made["formed"]["compile_seconds"]


def crossing(found: Found) -> float | None:
    """Tokens a step from which on GaLore, never formed, is as fast as AdamW.

    Of the first model and vocabulary without remat; between two numbers of tokens the
    ratio is a straight line over their logarithm. `None` where it crosses nowhere.
    """
    first = found["rows"][0]
    shared = {key: first[key] for key in ("model", "layers", "vocab", "remat")}
    curve = sorted(
        (case["tokens"], _over_adamw(case))
        for case in found["rows"]
        if shared.items() <= case.items()
    )
    for (low, below), (high, above) in itertools.pairwise(curve):
        if below < 1 <= above:
            return low * (high / low) ** ((1 - below) / (above - below))
    return None


def _over_adamw(case: Found) -> float:
    made = case["rows"]
    return made["never"]["tokens_per_second"] / made[ADAMW]["tokens_per_second"]


@of("speed/never_formed")
def never_formed_crossing(found: Found) -> str:
    at, first = crossing(found), found["rows"][0]
    shown = "at none of those measured" if at is None else f"{at:,.0f}"
    name = f"{model(first['model'])}, rank {first['rank']}"
    return table(("", "as fast as `optax.adamw` from, tokens a step"), [(name, shown)])
