# SPDX-License-Identifier: Apache-2.0
"""Do projectors in eight or four bits train as well as in f32, and how exact are they?

The demo's run with GaLore, its projectors in f32, bf16, eight and four bits; the same
seed and tokens. Then the f32 run's last projectors, stored in blocks of several sizes.

    python -m benchmarks.training.projector_bits
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import galore_optax
from benchmarks.lib import common
from galore_optax._stored import Affine

import demo
import metrics
from train import Trainer

DTYPES = ("float32", "bfloat16", "int8", "int4")
BLOCKS = (32, 64, 128, 256)


def train(dtype: str) -> tuple[dict[str, Any], Any]:
    """What is recorded of a run, and its last projectors."""
    options = (*demo.GALORE.options, f"projector_dtype={dtype}")
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(
            demo.GALORE,
            options=options,
            eval_every=100,
            eval_batches=64,
            out=Path(folder),
        )
        trainer = Trainer(run, name=dtype)
        result = trainer.train()
    projectors = _projectors(trainer.state.opt_state)
    row = {
        "loss": metrics.series(result.records, "validation_loss")[1][-1],
        "state_bytes": result.state_bytes,
        "projector_bytes": sum(x.nbytes for x in jax.tree.leaves(projectors)),
    }
    return row, projectors


def _projectors(opt_state: Any) -> Any:
    def is_state(node: Any) -> bool:
        return isinstance(node, galore_optax.GaLoreState)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_state)
    return next(node for node in nodes if is_state(node)).projector


def errors(bases: list[jax.Array], storage: Affine) -> dict[str, float]:
    """Of bases (m, rank), against what `storage` keeps of them; the worst of all."""
    rows = [_error(basis, storage) for basis in bases]
    entries = sum(basis.size for basis in bases)
    stored = [jax.eval_shape(storage.encode, basis) for basis in bases]
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(stored))
    worst = {name: max(row[name] for row in rows) for name in rows[0]}
    mean = float(np.mean([row["relative"] for row in rows]))
    return {"bytes_an_entry": size / entries, "mean_relative": mean, **worst}


def _error(basis: jax.Array, storage: Affine) -> dict[str, float]:
    kept = storage.decode(storage.encode(basis), basis.shape, jnp.float32)
    exact, kept = (np.asarray(x, np.float64) for x in (basis, kept))
    gram = kept.T @ kept - np.eye(kept.shape[1])
    return {
        "relative": np.linalg.norm(kept - exact) / np.linalg.norm(exact),
        "gram_entry": float(np.abs(gram).max()),
        "gram_norm": np.linalg.norm(gram, 2),
    }


def main() -> None:
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        found[dtype], projectors = train(dtype)
        if dtype == "float32":
            leaves = jax.tree.leaves(projectors)
            bases = [m for x in leaves for m in x.reshape(-1, *x.shape[-2:])]
    exact = found["float32"]
    for name, row in found.items():
        print(
            f"{name:10} loss {row['loss']:.4f} ({row['loss'] / exact['loss'] - 1:+.2%})"
            f"  {row['state_bytes']:12,} bytes, projectors {row['projector_bytes']:,}"
        )
    table = {
        f"int{bits}, blocks of {block}": errors(bases, Affine(bits, block))
        for bits in (8, 4)
        for block in BLOCKS
    }
    for name, row in table.items():
        print(f"{name:20}", {key: round(value, 4) for key, value in row.items()})
    common.write("training/projector_bits", {"runs": found, "errors": table})


if __name__ == "__main__":
    main()
