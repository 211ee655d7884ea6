# SPDX-License-Identifier: Apache-2.0
"""How much text do the packaged corpora hold?

python -m benchmarks.training.corpus_size
"""

from typing import Any

from benchmarks.lib import common

import corpora
import data

VOCAB = 32_000


def measure(name: str) -> dict[str, Any]:
    texts = list(corpora.documents(name, data.cache_dir() / "archives"))
    found = data.load(name, VOCAB)
    return {
        "documents": len(texts),
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens": len(found.train) + len(found.validation),
    }


def main() -> None:
    found = {name: measure(name) for name in corpora.CORPORA}
    for name, row in found.items():
        print(f"{name:6} " + ", ".join(f"{row[key]:,} {key}" for key in row))
    common.write("training/corpus_size", {"vocab": VOCAB, "corpora": found})


if __name__ == "__main__":
    main()
