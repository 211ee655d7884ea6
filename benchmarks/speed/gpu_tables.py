# SPDX-License-Identifier: Apache-2.0
"""Tables of what was measured on a GPU, and of what a compiler makes for one."""

from typing import Any

from benchmarks.lib.cells import Load, gb, table
from benchmarks.lib.subjects import Shapes

CARD = "speed/gpu_h200"
SIZE = {"60m": "60M", "1b": "1B", "7b": "7B"}
MOMENTS = {"float32": "f32", "bfloat16": "bf16", "int8": "eight bits"}
# The names of rows without a word on moments, by the dtype of the weights.
STEP_MOMENTS = {
    "optax.adamw": {"float32": "f32", "bfloat16": "bf16"},
    "optax.adamw, f32 moments": {"bfloat16": "f32"},
    "galore_adamw": {"float32": "f32", "bfloat16": "f32"},
    "galore_adamw8bit": {"float32": "eight bits", "bfloat16": "eight bits"},
    "optax.contrib.galore": {"float32": "f32", "bfloat16": "bf16"},
}


def _name(optimizer: str) -> str:
    return f"`{optimizer.removesuffix(', f32 moments')}`"


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.2f}"


def _share(part: float | None) -> str:
    """Of a peak, where it is known."""
    return "" if part is None else f"{100 * part:.1f} %"


def _refreshes(row: dict[str, Any]) -> tuple[str, str]:
    """Of what has any."""
    if "adamw" in row["optimizer"].lower() and "galore" not in row["optimizer"]:
        return "", ""
    found = row.get("first_refresh_seconds"), row["refresh_seconds"]
    return _ms(found[0]), _ms(found[1])


def gpu_steps(load: Load) -> str:
    found = load(CARD)
    rows = []
    for row in found["steps"].values():
        layout = "stacked" if row["stacked"] else "one leaf a matrix"
        setting = f"{SIZE[row['model']]}, {MOMENTS[row['dtype']]}, {layout}"
        moments = STEP_MOMENTS[row["optimizer"]][row["dtype"]]
        times = _ms(row["steady_seconds"]), *_refreshes(row)
        state = gb(row["state_bytes"])
        rows.append((setting, _name(row["optimizer"]), moments, *times, state))
    for row in found["torch"].values():
        if "optimizer" in row:
            setting = f"{SIZE[row['model']]}, f32, torch {row['torch']}"
            times = _ms(row["steady_seconds"]), *_refreshes(row)
            rows.append((setting, row["optimizer"], "f32", *times, ""))
    head = "weights, layout", "", "moments", "step, ms", "first refresh, ms"
    return table((*head, "refresh, ms", "state"), rows)


def gpu_limited(load: Load) -> str:
    estimates = {
        row["setting"]: row["estimate"]["total"]
        for row in load("memory/plan_vs_compiler")["rows"]
        if row["model"] == "7b" and row["method"] == "galore_adamw8bit(rank=1024)"
    }
    rows = [
        (
            f"{row['tokens']:,}",
            gb(row["limit_bytes"]),
            gb(estimates[f"1 x {row['tokens']} tokens, bfloat16, remat, layerwise"]),
            gb(row["peak_bytes"]),
            f"{row['tokens_per_second']:,.0f}",
        )
        for row in load(CARD)["limited"].values()
    ]
    head = "tokens a step", "limit", "estimate", "peak"
    return table((*head, "tokens/s"), rows)


def gpu_training(load: Load) -> str:
    rows = [
        (
            f"{SIZE[row['model']]}, {row['tokens']:,} tokens a step",
            _name(row["method"]),
            STEP_MOMENTS[row["method"]]["bfloat16"],
            f"{row['tokens_per_second']:,.0f}",
            _share(row["flop_utilisation"]),
            gb(row["peak_bytes"]),
        )
        for row in load(CARD)["training"].values()
    ]
    head = "bf16 weights", "", "moments", "tokens/s", "of the card's peak"
    return table((*head, "peak memory"), rows)


def gpu_probes(load: Load) -> str:
    rows = [
        (
            f"`{row['method']}`",
            "{} × {}".format(*row["shape"]),
            MOMENTS[row["dtype"]],
            f"{row['orthonormality']:.1e}",
            f"{row['energy']:.4f}",
        )
        for row in load(CARD)["probes"].values()
        if "orthonormality" in row
    ]
    head = "", "gradient", "in", "largest entry of PᵀP − I", "captured energy"
    return table(head, rows)


def gpu_refresh(load: Load) -> str:
    """Seconds of one basis by shape, and of all of a 7B model's."""
    counts = Shapes.load("7b").matrices()
    found: dict[str, dict[tuple[int, int], float]] = {}
    for row in load(CARD)["probes"].values():
        m, n = row["shape"]
        if (m, n) in counts and "refresh_seconds" in row:
            times = found.setdefault(row["method"], {})
            times[m, n] = row["refresh_seconds"]
    rows = []
    for method, times in found.items():
        complete = times.keys() == counts.keys()
        total = sum(counts[shape] * each for shape, each in times.items())
        cells = (_ms(times.get(shape)) for shape in counts)
        rows.append((method, *cells, f"{total:.1f}" if complete else ""))
    head = (f"{m} × {n}, ms" for m, n in counts)
    return table(("", *head, "all of 7B, s"), rows)


def gpu_epoch(load: Load) -> str:
    found = load("training/gpu_h200_epoch_60m")
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


def compiled_step_before(load: Load) -> str:
    return _compiled(load("memory/compiled_step_before"))


def compiled_step(load: Load) -> str:
    return _compiled(load("memory/compiled_step"))


def _compiled(found: dict[str, Any]) -> str:
    rows = [
        (
            name,
            *(str(row[key]) for key in ("kernels", "products", "conditionals")),
            ", ".join(map(_loop, row["loops"])),
            str(row["f32_arrays_of_leaf_size"]),
            gb(row["temporaries"]),
        )
        for name, row in found["rows"].items()
    ]
    head = "target, optimizer, program", "kernels", "products", "conditionals"
    return table((*head, "loops", "f32 arrays of a leaf", "temporaries"), rows)


def _loop(loop: dict[str, Any]) -> str:
    inside = "inside " * loop["depth"]
    return f"{inside}{loop['trips'] or '?'} turns of {loop['kernels']}"


ALL = (
    *(gpu_steps, gpu_limited, gpu_training, gpu_probes, gpu_refresh, gpu_epoch),
    compiled_step_before,
    compiled_step,
)
