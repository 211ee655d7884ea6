# SPDX-License-Identifier: Apache-2.0
"""A sentence whose numbers come from records."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.lib.cells import Load

README, RESULTS = "README.md", "docs/results.md"


@dataclasses.dataclass(frozen=True)
class Claim:
    """`text` with its numbers, as computed from the results, in `path`."""

    path: str
    text: str  # a format string
    numbers: Callable[[Load], Sequence[Any]]

    def render(self, load: Load) -> str:
        return self.text.format(*self.numbers(load))
