# SPDX-License-Identifier: Apache-2.0
"""What the documents say of gradients and subspaces, in numbers from the record."""

from typing import Any

import numpy as np

from benchmarks.lib.cells import Load
from benchmarks.lib.claim import README, RESULTS, Claim


def _means(by_matrix: dict[str, Any]) -> np.ndarray:
    """Over matrices and layers, by stop."""
    return np.mean(np.concatenate([np.array(x).T for x in by_matrix.values()]), axis=0)


def _energy(load: Load, which: str) -> np.ndarray:
    return _means(load("why/why_it_works")["energy"][which])


def left_out(load: Load) -> list[float]:
    """Per cent beyond rank 64: at first, at the second stop, most of all."""
    missing = 100 * (1 - _energy(load, "new, its own batch"))
    return [missing[0], missing[1], max(missing)]


def overlaps(load: Load) -> list[float]:
    """Successive subspaces and those of two batches: at the second stop, at the end."""
    found = load("why/why_it_works")["overlap"]
    pair = [_means(found[k]) for k in ("successive", "same_weights_next_batch")]
    return [pair[0][0], pair[1][1], pair[0][-1], pair[1][-1]]


def next_batch(load: Load) -> list[float]:
    """Of the next batch's energy, new bases and old ones: at step 100, at the end."""
    new, old = (
        _energy(load, k) for k in ("new, the next batch", "old, before refresh")
    )
    return [new[2], old[1], new[-1], old[-1]]


def unseen(load: Load) -> list[float]:
    """The least and the largest share of the next batch's energy, by stop."""
    found = _energy(load, "new, the next batch")
    return [min(found), max(found)]


CLAIMS = [
    Claim(
        RESULTS,
        "what rank 64 leaves out is {:.1f} % of the energy at the start, {:.2f} % at"
        " step 50 and up to {:.1f} % later",
        left_out,
    ),
    Claim(
        RESULTS,
        "{:.2f} against {:.2f} at step 50, {:.2f} against {:.2f} at the end",
        overlaps,
    ),
    Claim(
        RESULTS,
        "at step 100 new bases hold {:.2f} of the next batch's energy and the old ones"
        " held {:.2f}; at the end {:.2f} and {:.2f}.",
        next_batch,
    ),
    Claim(
        README,
        "of the next batch's energy the default's hold {:.2f} to {:.2f} there",
        unseen,
    ),
]
