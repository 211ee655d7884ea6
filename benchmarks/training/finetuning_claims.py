# SPDX-License-Identifier: Apache-2.0
"""What `docs/results.md` says of fine-tuning, in numbers from its record."""

from benchmarks.lib.cells import Load
from benchmarks.lib.claim import RESULTS, Claim


def trained(load: Load) -> list[float]:
    """Millions of parameters, and rows of SST-2."""
    found = load("training/finetuning")
    parameters = found["rows"]["AdamW"]["cola"]["trained"]
    return [parameters / 1e6, found["shorter"]["sst2"]["epoch_rows"]]


def states(load: Load) -> list[float]:
    """Bytes of GaLore's and LoRA's state in per cent of AdamW's."""
    rows = load("training/finetuning")["rows"]
    full, *others = (
        rows[name]["cola"]["state_bytes"]
        for name in ("AdamW", "GaLore, rank 4", "LoRA, rank 4")
    )
    return [100 * size / full for size in others]


CLAIMS = [
    Claim(
        RESULTS,
        "MiniLM, {:.1f} million parameters with their pre-trained values, on CoLA and"
        " RTE for two epochs with three seeds, on film reviews for one epoch and on"
        " {:,} rows of SST-2, once.",
        trained,
    ),
    Claim(
        RESULTS,
        "GaLore's state is {:.0f} % of AdamW's, LoRA's {:.1f} %.",
        states,
    ),
]
