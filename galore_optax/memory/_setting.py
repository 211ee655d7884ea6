# SPDX-License-Identifier: Apache-2.0
"""How a training step is run, as far as its memory depends on it."""

import dataclasses

DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a training step is run.

    Args:
      tokens: of one sequence.
      batch: sequences of a micro-batch.
      accumulation: micro-batches whose gradients are added up for one update.
      dtype: of weights, gradients and activations.
      remat: blocks keep only their inputs and compute the rest again.
      layerwise: the update of a layer is made as soon as its gradient is there.

    Raises:
      ValueError: a count below one, or an unknown dtype.

    Example:
      >>> from galore_optax import memory
      >>> memory.Setting(tokens=2048, remat=True).itemsize
      2
    """

    tokens: int = 256
    batch: int = 1
    accumulation: int = 1
    dtype: str = "bfloat16"
    remat: bool = False
    layerwise: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype={self.dtype!r} is unknown. Choose one of {', '.join(DTYPES)}."
            )

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype]

    @property
    def compromises(self) -> tuple[str, ...]:
        """What it gives up against a plain step."""
        names = {"remat": self.remat, "layerwise": self.layerwise}
        return tuple(name for name, used in names.items() if used)

    def __str__(self) -> str:
        parts = [f"{self.batch} x {self.tokens} tokens", self.dtype, *self.compromises]
        if self.accumulation > 1:
            parts.insert(1, f"{self.accumulation} micro-batches")
        return ", ".join(parts)
