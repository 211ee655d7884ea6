# SPDX-License-Identifier: Apache-2.0
"""What the library does on one GPU, in one command of under eight minutes.

    part       a row of it
    steps      seconds of an optimizer step and of a refresh
    limited    LLaMA-7B trained in a process that may use 24 GB: peak bytes, tokens/s
    training   tokens/s and FLOP utilisation of whole training steps
    never      coordinates of gradients never formed, beside those of gradients
    probes     a subspace method: orthonormality, captured energy, seconds
    torch      torch's AdamW and galore-torch, where torch with CUDA is

Rows are made in order of worth, each in a process of its own, which has the card for
itself; the command ends when its minutes are over. Every row is kept as soon as it is
there (`results/gpu_CARD.runs.json`) and not made again; what is there at the end is the
result, `results/gpu_CARD.json`, with what is missing and why.

    python -m benchmarks.speed.gpu [--minutes 8] [--tiny]

With --tiny: all parts at a size for a CPU, in this process, and nothing is recorded.
"""

import argparse
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.lib import records
from benchmarks.lib.shapes import Shapes
from benchmarks.lib.subjects import ADAMW, EIGHT_BIT, GALORE, THEIRS, WIDE
from benchmarks.speed.bases import METHODS, Basis
from benchmarks.speed.gpu_steps import Equality, Step, TorchStep, Training

LIMIT = 24e9  # bytes, of a card of this size
FRACTION = "XLA_PYTHON_CLIENT_MEM_FRACTION"
CACHE = records.ROOT / "out" / "gpu_cache"  # of compiled programs


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement, and what its process needs."""

    part: str
    subject: Step | TorchStep | Training | Basis | Equality
    seconds: float  # that it may take with nothing compiled yet; not begun with less
    limit: float | None = None  # bytes that its process may use

    def __str__(self) -> str:
        return f"{self.part}: {self.subject}"


BOTH = ADAMW, GALORE


def rows() -> list[Row]:
    """Everything, in order of worth."""
    small, large = Shapes.load("60m"), Shapes.load("7b")

    def step(model: str, shapes: Shapes, dtype: str, stacked: bool, name: str) -> Row:
        return Row("steps", Step(model, shapes, dtype, stacked, name), 20)

    def training(model: str, batch: int, name: str, **options: bool) -> Row:
        return Row("training", Training(model, name, batch, 256, **options), 35)

    def limited(batch: int) -> Row:
        run = Training("7b", EIGHT_BIT, batch, 256, 10, remat=True, layerwise=True)
        return Row("limited", run, 120, LIMIT)

    def never_7b(batch: int) -> Row:
        run = Training("7b", EIGHT_BIT, batch, 256, 10, remat=True, never=True)
        return Row("training", run, 120)

    def probes(shape: tuple[int, int], dtype: str, names: Sequence[str]) -> list[Row]:
        found = [Basis(name, shape, min(shape) // 4, dtype) for name in names]
        return [Row("probes", basis, 30) for basis in found]

    return [
        step("7b", large, "bfloat16", True, GALORE),
        training("60m", 64, GALORE, never=True),
        training("1b", 16, GALORE, never=True),
        step("7b", large, "bfloat16", True, EIGHT_BIT),
        *(training("60m", 64, name) for name in (GALORE, WIDE, ADAMW)),
        *(training("1b", 16, name) for name in (GALORE, WIDE)),
        step("7b", large, "bfloat16", True, ADAMW),
        *(Row("never", Equality("60m", x), 20) for x in ("float32", "bfloat16")),
        *probes((4096, 11008), "bfloat16", ("power", "eigh")),
        step("7b", large, "bfloat16", True, WIDE),
        *(step("60m", small, "float32", True, name) for name in BOTH),
        *(step("60m", small, "float32", False, name) for name in (*BOTH, THEIRS)),
        limited(8),
        never_7b(8),
        training("60m", 64, EIGHT_BIT),
        *(training("1b", 16, name, remat=True) for name in (GALORE, WIDE)),
        training("1b", 16, GALORE, remat=True, never=True),
        *(Row("torch", TorchStep("60m", small, name), 20) for name in torch_names()),
        *probes((768, 3072), "float32", tuple(METHODS)),
        limited(1),
        *probes((768, 3072), "bfloat16", tuple(METHODS)),
        *probes((4096, 4096), "bfloat16", ("power", "eigh", "svd")),
    ]


def tiny() -> list[Row]:
    """A row or two of every part, of a size for a CPU."""
    shapes = Shapes(32, 48, 2, vocab=64)
    whole = Training("demo", WIDE, 2, 16, 2)
    layerwise = dataclasses.replace(whole, method=ADAMW, layerwise=True)
    return [
        Row("steps", Step("tiny", shapes, "bfloat16", True, GALORE), 0),
        Row("steps", Step("tiny", shapes, "bfloat16", True, WIDE), 0),
        Row("limited", layerwise, 0, LIMIT),
        Row("training", whole, 0),
        Row("training", dataclasses.replace(whole, method=GALORE, never=True), 0),
        Row("never", Equality("demo", "float32"), 0),
        *(Row("probes", Basis(name, (48, 64), 8, "float32"), 0) for name in METHODS),
    ]


def torch_names() -> tuple[str, ...]:
    """Those of torch's optimizers that can be imported."""
    if importlib.util.find_spec("torch") is None:
        return ()
    ours = ("torch.optim.AdamW", "torch.optim.AdamW, fused")
    found = importlib.util.find_spec("galore_torch") is not None
    return ("galore-torch", *ours) if found else ours


def spend(
    seconds: float,
    wanted: Sequence[Row],
    make: Callable[[Row, float], str],  # within so many seconds; why it failed, or ""
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """Makes what there is time for; returns what is missing, and why."""
    end, missing = clock() + seconds, []
    for row in wanted:
        left = end - clock()
        reason = "no time left" if left < row.seconds else make(row, left)
        if reason:
            missing.append(f"{row}: {reason}")
    return missing


@dataclasses.dataclass(frozen=True)
class Card:
    """The device, which rows have for themselves, each in its process."""

    name: str  # as part of a file's name
    memory: int  # bytes; 0 where it does not say

    @classmethod
    def found(cls) -> "Card":
        """Asks in a process that lets go of it."""
        code = (
            "import jax; x = jax.devices()[0]; print(x.device_kind);"
            " print((x.memory_stats() or {}).get('bytes_limit', 0))"
        )
        told = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", FRACTION: "1.0"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(
            command, env=os.environ | told, capture_output=True, text=True, check=True
        )
        kind, size = done.stdout.splitlines()[-2:]
        name = re.sub(r"\W+", "_", kind.removeprefix("NVIDIA ")).lower()
        return cls(name, int(size))

    def make(self, row: Row, seconds: float) -> str:
        """Makes and keeps `row`; why it failed, or nothing."""
        command = [sys.executable, "-m", "benchmarks.speed.gpu", "--row", str(row)]
        told = {
            "JAX_COMPILATION_CACHE_DIR": str(CACHE),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
        } | os.environ
        if self.memory:
            share = min(0.95, (row.limit or self.memory) / self.memory)
            told[FRACTION] = f"{share:.4f}"
        options = {"cwd": records.ROOT, "capture_output": True, "text": True}
        try:
            done = subprocess.run(
                [*command, "--card", self.name], env=told, timeout=seconds, **options
            )
        except subprocess.TimeoutExpired:
            return f"not done after {seconds:.0f} s"
        print(done.stdout, end="", flush=True)
        return "" if done.returncode == 0 else last_line(done.stderr)


def last_line(text: str) -> str:
    """What an error says, without where."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "failed"


def keep(row: Row, card: str) -> None:
    """Measures `row`, unless it is on record."""
    runs = records.Runs(f"speed/gpu_{card}")
    print(row, runs.get(str(row), lambda: measured(row)), flush=True)


def measured(row: Row) -> dict[str, Any]:
    limit = {"limit_bytes": row.limit} if row.limit else {}
    return {"part": row.part} | limit | row.subject.measure()


def by_part(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows under their parts, by their names within them."""
    parts: dict[str, dict[str, Any]] = {}
    for key, row in found.items():
        part, name = key.split(": ", 1)
        values = {k: v for k, v in row.items() if k not in ("part", "machine")}
        parts.setdefault(part, {})[name] = values
    return parts


def record(card: str, missing: Sequence[str]) -> None:
    runs = records.Runs(f"speed/gpu_{card}")
    if not torch_names():
        missing = [*missing, "torch's rows: torch is not installed (extra 'rivals')"]
    records.write(f"speed/gpu_{card}", by_part(runs.found), missing, runs)


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--card", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tiny:
        for row in tiny():
            print(row, measured(row), flush=True)
    elif arguments.row:
        chosen = next(row for row in rows() if str(row) == arguments.row)
        keep(chosen, arguments.card)
    else:
        card = Card.found()
        made = records.Runs(f"speed/gpu_{card.name}").found
        wanted = [row for row in rows() if str(row) not in made]
        # Some seconds are for the record itself.
        missing = spend(60 * arguments.minutes - 10, wanted, card.make)
        record(card.name, missing)


if __name__ == "__main__":
    main()
