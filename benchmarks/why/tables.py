# SPDX-License-Identifier: Apache-2.0
"""Tables of what gradients and subspaces look like in training."""

from typing import Any

import numpy as np

from benchmarks.lib.tables import of, table


@of("why/captured_energy_gap50")
def captured_energy(found: dict[str, Any]) -> str:
    """Shares of the exact basis' energy."""
    rows = [
        (f"`{name}`", f"{x['least']:.4f}", f"{x['mean']:.4f}")
        for name, x in found["methods"].items()
    ]
    return table(("", "least", "mean"), rows)


@of("why/why_it_works")
def why_it_works(found: dict[str, Any]) -> str:
    """Means over matrices and layers, refresh by refresh."""
    energy, overlap = found["energy"], found["overlap"]
    columns = {
        "energy of its own batch": energy["new, its own batch"],
        "of the next": energy["new, the next batch"],
        "of the old basis": energy["old, before refresh"],
        "overlap with the old": overlap["successive"],
        "with the next batch's": overlap["same_weights_next_batch"],
    }
    cells = [_by_stop(x, len(found["steps"])) for x in columns.values()]
    rows = zip(map(str, found["steps"]), *cells, strict=True)
    return table(("step", *columns), rows)


def _by_stop(by_matrix: dict[str, Any], stops: int) -> list[str]:
    """What has no old basis to compare with lacks the first stop."""
    means = np.mean(np.concatenate(list(by_matrix.values()), axis=1), axis=1)
    return [""] * (stops - len(means)) + [f"{x:.2f}" for x in means]
