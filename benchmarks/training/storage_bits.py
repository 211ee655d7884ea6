# SPDX-License-Identifier: Apache-2.0
"""In how many bits may moments and projectors be kept?

    python -m benchmarks.training.storage_bits moments     # in f32 and in two codes
    python -m benchmarks.training.storage_bits projectors  # in f32, bf16, 8 and 4 bits
    python -m benchmarks.training.storage_bits bf16        # moments of 16-bit weights

The demo's run with GaLore, the same seed and tokens. `projectors` also stores the f32
run's last bases in blocks of several sizes. `bf16` has weights and computation in bf16,
and beside GaLore AdamW as Optax has it, at the rates that suit them in f32: with
moments in their default dtypes, all in f32, all in bf16; over seeds, so that
differences are taken seed by seed. Hours: `--minutes 30` starts no run after that,
`--list` shows what there is to run, and several processes share the runs.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lib import records
from benchmarks.lib.paired import difference
from benchmarks.lib.subjects import galore_state
from benchmarks.training import runs, tables
from galore_optax.codes.affine import Affine

import demo
from settings import Settings

SEEDS = range(3)
DTYPES = ("float32", "bfloat16", "int8", "int4")
BLOCKS = (32, 64, 128, 256)
BASE = dataclasses.replace(demo.GALORE, eval_every=100, eval_batches=64)


def with_options(base: Settings, *options: str, **changed: Any) -> Settings:
    return dataclasses.replace(base, options=(*base.options, *options), **changed)


MOMENTS = {"f32": BASE} | {
    code: with_options(BASE, f"code={code}", optimizer="galore_adamw8bit")
    for code in ("dynamic", "companded")
}


def moments() -> None:
    found = {name: runs.kept(runs.train(run, name)) for name, run in MOMENTS.items()}
    print(tables.eight_bit(found))
    records.write("training/eight_bit", found)


def projectors() -> None:
    rows, bases = {}, {}
    for dtype in DTYPES:
        run = with_options(BASE, f"projector_dtype={dtype}")
        result = runs.train(run, dtype)
        bases[dtype] = jax.tree.leaves(galore_state(result.state.opt_state).projector)
        size = sum(x.nbytes for x in bases[dtype])
        rows[dtype] = runs.kept(result) | {"projector_bytes": size}
    matrices = [m for x in bases["float32"] for m in x.reshape(-1, *x.shape[-2:])]
    table = {
        f"int{bits}, blocks of {block}": errors(matrices, Affine(bits, block))
        for bits in (8, 4)
        for block in BLOCKS
    }
    found = {"runs": rows, "errors": table}
    print(tables.projector_bits(found))
    records.write("training/projector_bits", found)


def errors(bases: list[jax.Array], code: Affine) -> dict[str, float]:
    """Of bases (m, rank), against what `code` keeps of them; the worst of all."""
    rows = [_error(basis, code) for basis in bases]
    entries = sum(basis.size for basis in bases)
    stored = [jax.eval_shape(code.encode, basis) for basis in bases]
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stored))
    worst = {name: max(row[name] for row in rows) for name in rows[0]}
    mean = float(np.mean([row["relative"] for row in rows]))
    return {"bytes_an_entry": size / entries, "mean_relative": mean, **worst}


def _error(basis: jax.Array, code: Affine) -> dict[str, float]:
    kept = code.decode(code.encode(basis), basis.shape, jnp.float32)
    exact, kept = (np.asarray(x, np.float64) for x in (basis, kept))
    gram = kept.T @ kept - np.eye(kept.shape[1])
    return {
        "relative": np.linalg.norm(kept - exact) / np.linalg.norm(exact),
        "gram_entry": float(np.abs(gram).max()),
        "gram_norm": np.linalg.norm(gram, 2),
    }


ADAMW, GALORE = "optax.adamw", "galore_adamw"
_BF16 = {"params_dtype": "bfloat16", "compute_dtype": "bfloat16"}
WIDE, NARROW = "moment_dtype=float32", "moment_dtype=bfloat16"
SETTINGS = {
    ADAMW: with_options(demo.ADAMW, **_BF16),
    f"{ADAMW}, f32 moments": with_options(demo.ADAMW, WIDE, **_BF16),
    GALORE: with_options(demo.GALORE, **_BF16),
    f"{GALORE}, all f32": with_options(demo.GALORE, WIDE, **_BF16),
    f"{GALORE}, all bf16": with_options(demo.GALORE, NARROW, **_BF16),
}
BASES = {name: GALORE if name.startswith(GALORE) else ADAMW for name in SETTINGS}


def key(name: str, steps: int, seed: int) -> str:
    return f"{name}, {steps} steps, seed {seed}"


def planned(steps: int, seeds: Sequence[int] = SEEDS) -> dict[str, Settings]:
    """Every run by its key; a seed of all settings before the next seed."""
    end = {"steps": steps, "eval_every": steps, "eval_batches": 64}
    return {
        key(name, steps, seed): dataclasses.replace(settings, seed=seed, **end)
        for seed in seeds
        for name, settings in SETTINGS.items()
    }


def rows(found: Mapping[str, Any], steps: int, seeds: Sequence[int]) -> dict[str, Any]:
    """A row for each setting of which every seed is on record."""
    made: dict[str, Any] = {}
    for name, base in BASES.items():
        each = [found.get(key(name, steps, seed)) for seed in seeds]
        if not all(each):
            continue
        losses = [run["loss"] for run in each]
        mean, size = float(np.mean(losses)), each[0]["state_bytes"]
        told = {"perplexity": math.exp(mean), "state_bytes": size}
        made[name] = {"losses": losses, "mean": mean} | told
        if name != base and base in made and len(seeds) > 1:
            less = difference(losses, made[base]["losses"])
            made[name]["less_base"] = less.record()
    return made


def bf16(minutes: float, only_list: bool) -> None:
    kept, steps = records.Runs("training/moments_bf16"), demo.ADAMW.steps
    plan = {
        name: lambda name=name, run=run: runs.kept(runs.train(run, name))
        for name, run in planned(steps).items()
    }
    if only_list:
        records.show_list(kept, plan)
        return
    missing = kept.fill(plan, minutes)
    found = rows(kept.found, steps, SEEDS)
    result = {"steps": steps, "seeds": len(SEEDS), "rows": found}
    print(tables.moments_bf16(result))
    records.write("training/moments_bf16", result, missing, kept)


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("part", choices=("moments", "projectors", "bf16"))
    parser.add_argument("--minutes", type=float, default=math.inf, help="of bf16")
    parser.add_argument("--list", action="store_true", help="of bf16's runs")
    arguments = parser.parse_args()
    if arguments.part == "bf16":
        bf16(arguments.minutes, arguments.list)
    else:
        {"moments": moments, "projectors": projectors}[arguments.part]()


if __name__ == "__main__":
    main()
