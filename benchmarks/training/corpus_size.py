# SPDX-License-Identifier: Apache-2.0
"""How much text do the packaged corpora hold?

python -m benchmarks.training.corpus_size
"""

from typing import Any

from benchmarks.lib import records
from benchmarks.training import tables

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
    measured = {name: measure(name) for name in corpora.CORPORA}
    found = {"vocab": VOCAB, "corpora": measured}
    print(tables.corpus_size(found))
    records.write("training/corpus_size", found)


if __name__ == "__main__":
    main()
