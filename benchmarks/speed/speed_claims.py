# SPDX-License-Identifier: Apache-2.0
"""What README and `docs/results.md` say of speed, in numbers from its records."""

import statistics
from typing import Any

from benchmarks.lib.cells import Load
from benchmarks.lib.claim import README, RESULTS, Claim


def _steps_ratio(load: Load, column: str) -> list[float]:
    """Contrib's time over ours, by size."""
    found = load("speed/optimizer_step")
    rows = [found["60M"], found["130M"]]
    return [r["optax.contrib.galore"][column] / r["galore_optax"][column] for r in rows]


def _torch_over_ours(load: Load) -> list[float]:
    """A gap of 200 steps and its refresh, by size."""

    def gap(row: dict[str, float]) -> float:
        return 200 * row["steady_seconds"] + row["refresh_seconds"]

    sizes = [found["rows"] for found in load("speed/against_torch").values()]
    return [gap(x["galore-torch"]) / gap(x["galore_optax"]) for x in sizes]


def _models(load: Load) -> list[Any]:
    """The points of whole models."""
    return [p for p in load("speed/floor")["points"] if p["curve"].startswith("model")]


def _headlines(load: Load) -> list[float]:
    """galore-torch over ours; ours over the floor, by size."""
    torch = [
        found["rows"]["galore-torch"] for found in load("speed/against_torch").values()
    ]
    return [
        *(statistics.median(row["steady_over_ours"]) for row in torch),
        *(point["ratio"]["galore_optax"] for point in _models(load)),
    ]


def _over_adamw(load: Load) -> list[float]:
    """Ours over AdamW's in place: both models, and one layer as wide as 7B's."""
    points = load("speed/floor")["points"]
    wide = next(p for p in points if (p["curve"], p["x"]) == ("width", 4096))
    seconds = [point["seconds"] for point in (*_models(load), wide)]
    return [row["galore_optax"] / row["optax.adamw"] for row in seconds]


def _contrib_on_blocks(load: Load) -> list[float]:
    """Least and largest time of contrib's over ours without embedding and head."""
    points = [
        p for p in load("speed/floor")["points"] if not p["curve"].startswith("model")
    ]
    seconds = [point["seconds"] for point in points]
    ratios = [row["optax.contrib.galore"] / row["galore_optax"] for row in seconds]
    return [min(ratios), max(ratios)]


def _refresh_7b(load: Load) -> list[float]:
    """SVD and eigh over the default, SVD over its first; its share of energy."""
    methods = load("speed/refresh_7b")["methods"]
    ours = methods["power(), the default"]
    svd, eigh = (methods[name]["refresh_seconds"] for name in ("svd()", "eigh()"))
    return [
        svd / ours["refresh_seconds"],
        eigh / ours["refresh_seconds"],
        svd / ours["first_refresh_seconds"],
        min(ours["share_of_exact_energy"].values()),
    ]


def _floor_ratios(load: Load) -> list[float]:
    """Least and largest time over the floor: of all points' ours, and of AdamW's."""
    points = load("speed/floor")["points"]
    found = [len(points)]
    for name in ("galore_optax", "optax.adamw"):
        ratios = [point["ratio"][name] for point in points]
        found += [min(ratios), max(ratios)]
    return found


CLAIMS = [
    Claim(
        RESULTS,
        "A whole gap of 200 steps with its refresh costs galore-torch {:.1f} and {:.1f}"
        " times what it costs here.",
        _torch_over_ours,
    ),
    Claim(
        RESULTS,
        "Over {} points a step takes {:.2f} to {:.2f} times its floor, one of"
        " `optax.adamw` {:.2f} to {:.2f} times its own",
        _floor_ratios,
    ),
    Claim(
        README,
        "galore-torch's steady steps take {:.1f} and {:.1f} times as long as ours (60M"
        " and 130M, medians of three starts), ours {:.2f} and {:.2f} times what the"
        " machine's rates of products and copies allow.",
        _headlines,
    ),
    *(
        Claim(
            path,
            "Applied in place, a step of ours takes {:.1f} and {:.1f} times one of"
            " `optax.adamw` (60M, 130M), and in one layer of the width of LLaMA-7B"
            " {:.0f} times.",
            _over_adamw,
        )
        for path in (README, RESULTS)
    ),
    Claim(
        RESULTS,
        "one of contrib's {:.2f} to {:.2f} times ours; the rest of the difference for"
        " whole models",
        _contrib_on_blocks,
    ),
    *(
        Claim(
            path,
            "{:.1f} times less than exact SVD and {:.1f} times less than exact `eigh()`"
            " (the first of a run, {:.1f} times less than SVD), for {:.4f} of the"
            " energy",
            _refresh_7b,
        )
        for path in (README, RESULTS)
    ),
    Claim(
        README,
        "Our refresh costs {:.0f} and {:.0f} times less than its, **and our compilation"
        " {:.1f} and {:.1f} times more**",
        lambda load: [
            *_steps_ratio(load, "refresh_seconds"),
            *(1 / x for x in _steps_ratio(load, "compile_seconds")),
        ],
    ),
]
