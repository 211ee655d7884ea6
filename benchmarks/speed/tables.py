# SPDX-License-Identifier: Apache-2.0
"""Tables of what was timed."""

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.lib.shapes import Shapes
from benchmarks.lib.tables import gb, model, ms, of, signed, table
from benchmarks.memory.tables import EIGHT_BIT, row_7b

OURS, ADAMW, THEIRS = "galore_optax", "optax.adamw", "optax.contrib.galore"
STEPPED = ADAMW, OURS, THEIRS
STEP_HEAD = "", "compile", "steady step", "refresh", "state bytes"
Found = dict[str, Any]
CARD, FIRST = "speed/gpu_h200", "speed/gpu_h200_first"


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
