# SPDX-License-Identifier: Apache-2.0
"""Models by name and by file, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from galore_optax import memory
from galore_optax.memory import Sizes


def test_all_configurations_load() -> None:
    sizes = {name: Sizes.load(name) for name in memory.config_names()}
    assert {"9m", "130m", "7b", "13b", "demo"} <= set(sizes)
    weights = {n: memory.tree_bytes(memory.shapes(s)) / 2e6 for n, s in sizes.items()}
    assert round(weights["7b"], 2) == 6738.42
    assert round(weights["60m"], 2) == 58.07


def test_a_config_of_grouped_queries_loads(tmp_path: Path) -> None:
    found = json.loads(memory.config_path("demo").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(found | {"num_key_value_heads": 2, "head_dim": 32})
    )
    sizes = Sizes.load(str(tmp_path / "config.json"))
    assert (sizes.key_width, sizes.query_width) == (64, 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"hidden_size": 250, "num_attention_heads": 4}, "hidden_size=250"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"hidden_size": None}, "lacks hidden_size"),
    ],
)
def test_configs_that_are_no_llama_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    found = json.loads(memory.config_path("demo").read_text()) | change
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    with pytest.raises(ValueError, match=message):
        Sizes.load(str(path))


def test_an_unknown_model_is_told_the_nearest() -> None:
    with pytest.raises(FileNotFoundError, match="Did you mean '130m'"):
        Sizes.load("130mm")


def test_importing_starts_no_backend() -> None:
    code = (
        "import galore_optax.memory, galore_optax.layerwise;"
        "from jax._src import xla_bridge;"
        "assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
