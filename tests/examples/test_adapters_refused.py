# SPDX-License-Identifier: Apache-2.0
"""Settings of adapters that are refused before anything is loaded."""

from typing import Any

import pytest

from settings import Settings

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"adapter": "lore"}, "unknown adapter 'lore'; known: lora, relora"),
    "rank": ({"adapter": "lora", "adapter_rank": 0}, "adapter_rank=0 must be at"),
    "large rank": (
        {"adapter": "factors", "adapter_rank": 300},
        "adapter_rank=300 is more than the 256",
    ),
    "layers": ({"adapter": "lora", "layerwise": True}, "adapter=lora with layerwise"),
    "galore": (
        {"adapter": "lora", "optimizer": "galore_lion"},
        "two low-rank methods at once.\\s+Take 'lion'",
    ),
    "no reset": ({"adapter": "relora"}, "adapter_reset=0 with adapter=relora"),
    "reset": ({"adapter": "lora", "adapter_reset": 5}, "adapter_reset=5 with adapter"),
    "no Adam": (
        {"adapter": "relora", "adapter_reset": 50, "optimizer": "adamw8bit"},
        "optimizer=adamw8bit: a restart prunes",
    ),
    "warm-up": (
        {"adapter": "relora", "adapter_reset": 10, "adapter_warmup": 10},
        "adapter_warmup=10, adapter_reset=10, steps=400 must grow",
    ),
    "late reset": (
        {"adapter": "relora", "adapter_reset": 400},
        "adapter_reset=400, steps=400 must grow",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Settings(**{"optimizer": "adamw"} | changes)
