# SPDX-License-Identifier: Apache-2.0
"""The examples are no packages; their tests need more than the library's do."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from galore_optax.memory import config_path

ROOT = Path(__file__).resolve().parents[2]
LLAMA = ROOT / "examples" / "llama"
EXAMPLES = ROOT / "examples"
for folder in (EXAMPLES, LLAMA, EXAMPLES / "finetune", EXAMPLES / "vit"):
    sys.path.insert(0, str(folder))
collect_ignore_glob = []
try:
    import grain  # noqa: F401
    import safetensors  # noqa: F401
    import tokenizers  # noqa: F401
    import tyro  # noqa: F401
except ImportError:  # the extra "examples" is not installed
    collect_ignore_glob = ["test_*.py"]

TEXT = "the low rank gradient of a matrix learns slowly and then quickly"


def sentences(count: int, seed: int) -> list[str]:
    rng, words = np.random.default_rng(seed), TEXT.split()
    return [" ".join(rng.choice(words, rng.integers(5, 60))) for _ in range(count)]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files named and shaped like C4's, a tokenizer and the config of a tiny model."""
    import data

    folder = tmp_path_factory.mktemp("c4")
    for split, shards in (("train", 2), ("validation", 1)):
        for shard in range(shards):
            name = f"c4-{split}.{shard:05}-of-{shards:05}.json.gz"
            with gzip.open(folder / name, "wt") as file:
                for text in sentences(150, 10 * shards + shard):
                    file.write(json.dumps({"text": text, "url": "u"}) + "\n")
    tokenizer = data.train_tokenizer(sentences(200, 1), 300)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = json.loads(config_path("demo").read_text()) | {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    (folder / "tiny.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def grouped(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same beside a model of grouped queries and a tied head."""
    folder = tmp_path_factory.mktemp("grouped")
    shutil.copytree(files, folder, dirs_exist_ok=True)
    config = json.loads((files / "tiny.json").read_text()) | {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    (folder / "tiny.json").write_text(json.dumps(config))
    return folder
