# SPDX-License-Identifier: Apache-2.0
"""What each of 16 or 64 TPU chips holds and sends in an optimizer step of LLaMA-7B.

    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)

as one program, weights in bf16 and split over all chips along the kept axis (FSDP),
rank 1024, weights and state donated. `steady` has no refresh in it; `any` is the step
that is due to refresh or not, as `tx.update` is without further ado.

    python -m benchmarks.memory.many_devices

Needs the extra aot-tpu and no TPU.
"""

import dataclasses
import functools
import math
import re
import sys
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from benchmarks.lib import records
from benchmarks.lib.subjects import ADAMW, EIGHT_BIT, GALORE, applied, optimizer, timed
from benchmarks.memory import hlo, tables, targets
from benchmarks.memory.state_per_device import RANK, split
from galore_optax import sharded, state_shardings

TOPOLOGIES = {16: "v5e:4x4", 64: "v5e:8x8"}
STEPS = {"steady": False, "any": None}
_COLLECTIVE = re.compile(
    r"^(\S+|\(.*?\)) (all-gather|all-reduce|all-to-all|collective-permute)"
    r"(?:-start)?\(.*channel_id=(\d+)"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+))\[([\d,]*)\]")


def devices(chips: int) -> Any:
    target = dataclasses.replace(targets.target("v5e"), topology=TOPOLOGIES[chips])
    return target.devices()


def mesh(chips: int) -> Mesh:
    found = np.array(devices(chips))
    return Mesh(found, ("fsdp",), axis_types=(AxisType.Auto,))


def compiled(name: str, refresh: bool | None, chips: int) -> tuple[float, Any]:
    """Seconds of compiling, and the program."""
    params = split(mesh(chips), "hidden", jnp.bfloat16)
    tx = sharded(optimizer(name, RANK, 200), params)
    state = jax.tree.map(
        lambda x, place: x.update(sharding=place),
        jax.eval_shape(tx.init, params),
        state_shardings(tx, params),
    )
    extra = {} if name == ADAMW else {"refresh": refresh}
    step = jax.jit(applied(tx, **extra), donate_argnums=(0, 1))
    lowered = step.trace(params, state, params).lower(lowering_platforms=("tpu",))
    return timed(lowered.compile)


def measure(chips: int, name: str, step: str) -> dict[str, Any]:
    seconds, program = compiled(name, STEPS[step], chips)
    sizes = program.memory_analysis()
    return {
        "arguments": sizes.argument_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "not_donated": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "collectives": collectives(program.as_text()),
        "compile_seconds": seconds,
    }


def collectives(text: str) -> dict[str, int]:
    """Bytes of what each kind leaves on a chip; where that is a refresh, of one."""
    found: dict[str, dict[Any, float]] = {}
    for number, (line, times) in enumerate(hlo.Program.parse(text).runs()):
        if not (match := _COLLECTIVE.match(line.text)):
            continue
        shapes, kind, channel = match.groups()
        # One that overlaps with products is written several times; those inside
        # `shard_map`, which do not, share a channel.
        key = number if kind == "all-to-all" else channel
        size = times * sum(map(_bytes, _ARRAY.findall(shapes)))
        found.setdefault(kind, {})[key] = size
    return {kind: round(sum(channels.values())) for kind, channels in found.items()}


def _bytes(array: tuple[str, str, str]) -> int:
    _, bits, shape = array
    return math.prod(map(int, filter(None, shape.split(",")))) * int(bits or 8) // 8


def plan() -> list[tuple[int, str, str]]:
    low = EIGHT_BIT, GALORE
    first = [(16, ADAMW, "any"), *((16, name, "any") for name in low)]
    first += [(16, name, "steady") for name in low]
    return [*first, (64, ADAMW, "any"), *((64, name, "any") for name in low)]


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="start none after")
    warnings.simplefilter("ignore")
    targets.target("v5e").prepare()
    try:
        devices(16)
    except RuntimeError as error:
        sys.exit(f"skipped, nothing is recorded: {error}")
    runs = records.Runs("memory/many_devices")
    keys = {f"{x[0]} chips, {x[1]}, {x[2]}": x for x in plan()}
    makes = {key: functools.partial(measure, *of) for key, of in keys.items()}
    missing = runs.fill(makes, parser.parse_args().minutes)
    rows = [
        {"chips": chips, "optimizer": name, "step": step} | runs.found[key]
        for key, (chips, name, step) in keys.items()
        if key in runs.found
    ]
    found = {"model": "7b", "rank": RANK, "rows": rows}
    print(tables.many_devices(found))
    records.write("memory/many_devices", found, missing, runs)


if __name__ == "__main__":
    main()
