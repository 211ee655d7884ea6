# SPDX-License-Identifier: Apache-2.0
"""That runs differ in moments alone, go on where they stopped, and are compared."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.training import storage_bits, tables
from benchmarks.training.storage_bits import ADAMW, GALORE, SETTINGS
from galore_optax.codes.affine import Affine

from settings import Settings


def moments(settings: Settings) -> dict[str, set[Any]]:
    """Dtypes of the second moments of projected kernels and of the embedding."""
    program = settings.program()
    state = jax.eval_shape(lambda: program.init(program.init_params(0)))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    found: dict[str, set[Any]] = {"kernel": set(), "embedding": set()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if "/nu/" in name:
            kind = "embedding" if "embed" in name else "kernel" if "/q/" in name else ""
            found.get(kind, set()).add(str(leaf.dtype))
    return found


def test_runs_differ_in_the_dtypes_of_moments_alone() -> None:
    narrow, wide = {"bfloat16"}, {"float32"}
    expected = {
        ADAMW: (narrow, narrow),
        f"{ADAMW}, f32 moments": (wide, wide),
        GALORE: (wide, narrow),
        f"{GALORE}, all f32": (wide, wide),
        f"{GALORE}, all bf16": (narrow, narrow),
    }
    found = {name: moments(settings) for name, settings in SETTINGS.items()}
    pairs = {name: (x["kernel"], x["embedding"]) for name, x in found.items()}
    assert pairs == expected


def test_every_seed_of_a_setting_is_planned() -> None:
    plan = storage_bits.planned(steps=4, seeds=[0, 1])
    assert len(plan) == 2 * len(SETTINGS)
    assert next(iter(plan)) == "optax.adamw, 4 steps, seed 0"
    for name, run in plan.items():
        assert name.endswith(f"seed {run.seed}")
        assert (run.steps, run.eval_every) == (4, 4)


def test_moments_and_projectors_are_all_that_changes() -> None:
    assert storage_bits.MOMENTS["dynamic"].optimizer == "galore_adamw8bit"
    assert "code=dynamic" in storage_bits.MOMENTS["dynamic"].options
    seeds = {run.seed for run in storage_bits.MOMENTS.values()}
    assert len(seeds) == 1


def test_errors_are_of_what_is_stored() -> None:
    basis = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (128, 8)))[0]
    eight, four = (storage_bits.errors([basis], Affine(bits, 64)) for bits in (8, 4))
    assert eight["bytes_an_entry"] == pytest.approx(1 + 3 / 64, abs=1 / 64)
    # Uniform rounding errs by a twelfth of a step; steps of four bits are 17 times
    # those of eight.
    assert four["relative"] / eight["relative"] == pytest.approx(17, rel=0.2)
    assert 0 < eight["gram_entry"] <= eight["gram_norm"] < four["gram_norm"]


def test_differences_are_those_of_an_optimizers_own_default() -> None:
    losses = dict(zip(SETTINGS, (5.0, 4.5, 4.0, 4.25, 6.0), strict=True))
    found = {
        storage_bits.key(name, 4, seed): {"loss": loss + seed, "state_bytes": 1000}
        for name, loss in losses.items()
        for seed in range(2)
    }
    made = storage_bits.rows(found, 4, range(2))
    less = {name: row.get("less_base", {}).get("mean") for name, row in made.items()}
    assert list(less.values()) == [None, -0.5, None, 0.25, 2.0]
    assert made[ADAMW]["perplexity"] == pytest.approx(math.exp(5.5))
    text = tables.moments_bf16({"rows": made}).splitlines()
    assert text[2] == "| `optax.adamw` | 5.000, 6.000 | 244.7 | 1,000 bytes |  |  |  |"
    assert "| -0.5000 |" in text[3].replace("−", "-")
    del found[storage_bits.key(ADAMW, 4, 1)]
    assert ADAMW not in storage_bits.rows(found, 4, range(2))
