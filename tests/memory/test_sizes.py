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


# Published numbers of parameters; of the second line the rest is norms and biases.
WHOLE = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "gemma-2b": 2_506_172_416,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
}
NEARLY = {
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-1b": 999_885_952,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
}


@pytest.mark.parametrize("name", [*WHOLE, *NEARLY])
def test_published_models_have_their_number_of_parameters(name: str) -> None:
    found = memory.tree_bytes(memory.shapes(Sizes.load(name), "int8"))
    published = (WHOLE | NEARLY)[name]
    assert found == published or name in NEARLY
    assert 0 <= published - found <= 1e-4 * published


def test_a_tied_head_has_a_norm_alone(tmp_path: Path) -> None:
    found = json.loads(memory.config_path("demo").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(found | {"tie_word_embeddings": True}))
    assert set(memory.shapes(Sizes.load(str(path))).head) == {"norm"}
    assert set(memory.shapes(Sizes.load("demo")).head) == {"norm", "kernel"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
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


def test_a_folder_stands_for_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(memory.config_path("demo").read_text())
    assert Sizes.load(str(tmp_path)) == Sizes.load("demo")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# Read me", r"config\.json is no JSON .*Give the config\.json of a model"),
        (b"\xff\xfe", r"config\.json is no JSON"),
        (b"[1, 2]", "lacks vocab_size"),
    ],
)
def test_a_file_that_is_no_config_is_named(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
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
