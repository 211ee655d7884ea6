# SPDX-License-Identifier: Apache-2.0
"""What a compiler says that a program holds."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The compiler's buffer assignment of one step, in bytes."""

    target: str
    capacity: int  # of the device
    arguments: int = 0  # weights, state and tokens
    temporaries: int = 0
    outputs: int = 0
    aliased: int = 0  # outputs that take the place of donated arguments
    tokens: int = 0  # of the batch, among the arguments
    refused: int | None = None  # bytes, where the compiler refused the program

    @property
    def total(self) -> int:
        """arguments + temporaries + outputs - aliased, or what the refusal names."""
        if self.refused is not None:
            return self.refused
        return self.arguments + self.temporaries + self.outputs - self.aliased

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity
