# SPDX-License-Identifier: Apache-2.0
"""Tables of what training reached."""

import types
from typing import Any

from benchmarks.lib.paired import difference
from benchmarks.lib.tables import INTERVAL, less, mean_and_deviation, of, signed, table

import demo as example

Found = dict[str, Any]
SCALE = 0.25  # GaLore's, by default


@of("training/demo")
def demo(found: Found) -> str:
    """As the demo prints it."""
    results = {k: types.SimpleNamespace(**row) for k, row in found.items()}
    lines = example.table(results).splitlines()
    return "\n" + "\n".join(f"    {line}" for line in lines) + "\n"


@of("training/demo_seeds")
def demo_seeds(found: Found) -> str:
    names = {
        "GaLore, default": "GaLore, default subspace method",
        "GaLore, svd": "GaLore, exact SVD",
        "AdamW": "AdamW",
    }
    losses = found["final_validation_loss"]
    rows = [
        (name, ", ".join(f"{x:.3f}" for x in losses[k])) for k, name in names.items()
    ]
    seeds = ", ".join(str(n) for n in range(len(losses["AdamW"])))
    return table(("", f"seeds {seeds}"), rows)


@of("training/eight_bit")
def eight_bit(found: Found) -> str:
    names = {"f32": "f32"}
    names |= {code: f"`codes.{code}()`" for code in ("dynamic", "companded")}
    rows = [
        (
            name,
            _loss(found[key]["loss"], found["f32"]["loss"]),
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


@of("training/projector_bits")
def projector_bits(found: Found) -> str:
    """Errors are of the run's last bases, in the blocks that are the default."""
    runs, rows = found["runs"], []
    for key, run in runs.items():
        error = found["errors"].get(f"{key}, blocks of 64", {})
        shown = ("bytes_an_entry", 2), ("mean_relative", 3), ("gram_norm", 3)
        cells = [f"{error[name]:.{n}f}" if error else "" for name, n in shown]
        size = f"{run['projector_bytes']:,}"
        rows.append((key, _loss(run["loss"], runs["float32"]["loss"]), size, *cells))
    head = "projectors", "final validation loss", "bytes of projectors"
    errors = "relative error of a basis P", "norm of PᵀP - I"
    return table((*head, "an entry", *errors), rows)


@of("training/moments_bf16")
def moments_bf16(found: Found) -> str:
    """By optimizer and dtype of moments, with the interval against its default."""
    rows = [
        (
            f"`{name}`",
            ", ".join(f"{loss:.3f}" for loss in row["losses"]),
            f"{row['perplexity']:.1f}",
            f"{row['state_bytes']:,} bytes",
            *(less(row["less_base"]) if "less_base" in row else ("", "", "")),
        )
        for name, row in found["rows"].items()
    ]
    head = "", "validation loss by seed", "perplexity", "optimizer state"
    return table((*head, "loss less the default's", *INTERVAL), rows)


@of("training/llama_9m")
def llama_9m(found: Found) -> str:
    rows = [
        (
            name,
            f"{run['learning_rate']:g}",
            f"{run.get('matrix_rate', SCALE):g}",
            f"{run['perplexity']:.1f}",
            f"{run['tokens_per_second']:,.0f}",
            f"{run['state_bytes']:,} bytes",
        )
        for name, run in found["runs"].items()
    ]
    head = "learning rate", "of matrices", "validation perplexity", "tokens/s"
    return table(("", *head, "optimizer state"), rows)


@of("training/corpus_size")
def corpus_size(found: Found) -> str:
    rows = [
        (
            f"`{name}`",
            f"{row['documents']:,}",
            f"{row['bytes'] / 1e6:.1f} MB",
            f"{row['tokens'] / 1e6:.1f} million",
        )
        for name, row in found["corpora"].items()
    ]
    head = "", "documents", "size", f"tokens, of a vocabulary of {found['vocab']:,}"
    return table(head, rows)


@of("training/pretraining_1m", "training/pretraining_speed_1m")
def pretraining(found: Found, speed: Found) -> str:
    """In the form of the paper's Table 2, best first."""
    rows = [
        (
            name,
            mean_and_deviation(row["perplexities"]) + _notes(row),
            *(f"{row['bf16_bytes'][part] / 1e6:.2f}" for part in ("weights", "states")),
            _speed(speed["methods"].get(name)),
            f"{row['learning_rate']:g}",
            f"{row['ratio']:g}" if name != found["control"] else "0",
        )
        for name, row in found["rows"].items()
    ]
    head = "", "perplexity", "weights, MB", "states, MB", "tokens/s"
    return table((*head, "learning rate", "of matrices"), rows)


def _notes(row: Found) -> str:
    diverged = f" ({row['diverged']} diverged)" if row["diverged"] else ""
    return diverged + ("" if row.get("tuned", True) else " (its grid is not finished)")


def _speed(row: Found | None) -> str:
    return f"{row['tokens_per_second']:,.0f}" if row else ""


@of("training/pretraining_1m")
def pretraining_galore(found: Found) -> str:
    """Losses less GaLore's, seed by seed; what diverged has no pair."""
    ours = found["rows"]["GaLore"]["losses"]
    rows = [
        (name, *less(difference(row["losses"], ours).record()))
        for name, row in found["rows"].items()
        if name != "GaLore" and len(row["losses"]) == len(ours) > 1
    ]
    return table(("", "loss less GaLore's", *INTERVAL), rows)


@of("training/pretraining_1m")
def pretraining_ratios(found: Found) -> str:
    """Least losses of seed 0 on the grid of each ratio."""
    ratios = sorted({r for row in found["rows"].values() for r in row["grid"]})
    rows = [
        (name, *(_least(row["grid"].get(ratio)) for ratio in ratios))
        for name, row in found["rows"].items()
    ]
    return table(("least loss", *ratios), rows)


def _least(grid: Found | None) -> str:
    losses = [loss for loss in (grid or {}).values() if loss]
    return f"{min(losses):.3f}" if losses else ""


@of("training/ablations")
def ablations(found: Found) -> str:
    """Every setting but those of rank and gap."""
    rows = [
        (f"{study}: {row['name']}", f"{row['mean']:.4f}", *less(row["less_base"]))
        for study, settings in found["studies"].items()
        if study != found["grid"]
        for row in settings[1:]
    ]
    head = "changed", "validation loss", "less the base's"
    return table((*head, *INTERVAL), rows)


@of("training/ablations")
def ablations_grid(found: Found) -> str:
    """Mean losses by rank and gap."""
    losses = {(x["rank"], x["gap"]): x["mean"] for x in found["studies"][found["grid"]]}
    ranks = sorted({rank for rank, _ in losses})
    gaps = sorted({gap for _, gap in losses}, key=lambda gap: (gap == "never", gap))
    rows = [
        (
            f"rank {r}",
            *(f"{losses[r, g]:.4f}" if (r, g) in losses else "" for g in gaps),
        )
        for r in ranks
    ]
    return table(("validation loss, gap", *map(str, gaps)), rows)


@of("training/ablations")
def figure_5(found: Found) -> str:
    """The least and the largest gap of a rank, each against the best of the others."""
    rows = [
        (f"rank {rank}, gap {x['gap']}", str(x["best_other"]), *less(x))
        for rank, row in found["figure_5"].items()
        for x in (row["too_frequent"], row["too_rare"])
    ]
    return table(("", "best other gap", "loss less its", *INTERVAL), rows)


TASKS = {
    "cola": "CoLA, Matthews",
    "rte": "RTE, accuracy",
    "sst2": "SST-2, accuracy",
    "reviews": "film reviews, accuracy",
}


@of("training/finetuning", "training/finetuning_speed")
def finetuning(found: Found, speed: Found) -> str:
    """In the form of the paper's Table 4, scores in hundredths."""
    rows, slower = [], speed["over_adamw"]
    for name, cells in found["rows"].items():
        some = next(iter(cells.values()))
        scores = (
            mean_and_deviation([100 * x for x in cells[task]["dev_metric"]])
            if task in cells
            else ""
            for task in TASKS
        )
        size = f"{some['state_bytes']:,}", f"{some['trained']:,}"
        step = f"{slower[name]:.2f}" if name in slower else ""
        rows.append((name, *scores, *size, step))
    head = "bytes of state", "trained", "step / AdamW's"
    return table(("", *TASKS.values(), *head), rows)


@of("training/finetuning")
def finetuning_pairs(found: Found) -> str:
    """Scores less AdamW's in hundredths, where there are seeds to pair."""
    (base, theirs), *others = found["rows"].items()
    rows = [
        (f"{name}, {TASKS[task]}", *_less_in_hundredths(cell, theirs[task]))
        for task in TASKS
        for name, cells in others
        if (cell := cells.get(task)) and len(cell["dev_metric"]) > 1
    ]
    return table(("", f"less {base}'s", *INTERVAL), rows)


def _less_in_hundredths(cell: Found, base: Found) -> tuple[str, str, str]:
    scores = ([100 * x for x in found["dev_metric"]] for found in (cell, base))
    return less(difference(*scores).record(), 2)


@of("training/finetuning_llama")
def finetuning_llama(found: Found) -> str:
    names = {"adamw": "AdamW", "galore": "GaLore", "lora": "LoRA"}
    rows = [
        (
            names[run["method"]],
            f"{run['rate']:g}",
            f"{run['before']:.3f}",
            f"{run['loss']:.3f}",
            f"{run['trained']:,}",
            f"{run['state_bytes']:,} bytes",
        )
        for run in _by_method(found["runs"])
    ]
    losses = "validation loss before", "after"
    head = "", "learning rate", *losses, "trained", "optimizer state"
    return table(head, rows)


@of("training/finetuning_llama")
def finetuning_llama_samples(found: Found) -> str:
    """Of each method at the rate of the least loss."""
    runs = sorted(found["runs"].values(), key=lambda run: run["loss"], reverse=True)
    best = _by_method({run["method"]: run for run in runs})  # the last of each stays
    texts = {"before": best[0]["sample_before"]}
    texts |= {f"{run['method']}, {run['rate']:g}": run["sample"] for run in best}
    rows = [(name, " ".join(text.split())) for name, text in texts.items()]
    return table(("", f'after the prompt "{found["prompt"]}"'), rows)


def _by_method(runs: Found) -> list[Found]:
    """The runs of each method by their rates."""
    return sorted(runs.values(), key=lambda run: (run["method"], run["rate"]))


@of("training/digits")
def digits(found: Found) -> str:
    """After the last epoch, each method's rates in order."""
    names = {"adamw": "AdamW", "galore": "GaLore"}
    rows = [
        (
            names[run["method"]],
            f"{run['rate']:g}",
            f"{run['loss'][-1]:.4f}",
            f"{run['accuracy'][-1]:.2%}",
            f"{run['state_bytes']:,} bytes",
        )
        for run in _by_method(found["runs"])
    ]
    losses = "mean loss of the last epoch", "test images classified correctly"
    return table(("", "learning rate", *losses, "optimizer state"), rows)
