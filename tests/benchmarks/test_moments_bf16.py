# SPDX-License-Identifier: Apache-2.0
"""That runs differ in moments alone, go on where they stopped, and are compared."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.lib import common
from benchmarks.training import moments_bf16, tables
from benchmarks.training.moments_bf16 import ADAMW, GALORE, SETTINGS

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


def test_runs_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def train(name: str, settings: Settings) -> dict[str, Any]:
        assert (settings.steps, settings.eval_every) == (4, 4)
        assert name.endswith(f"seed {settings.seed}")
        made.append(name)
        return {"loss": 1.0, "state_bytes": 8}

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(moments_bf16, "train", train)
    plan = moments_bf16.planned(steps=4, seeds=2)
    first = dict(list(plan.items())[:3])
    moments_bf16.run_all(common.Runs("training/moments_bf16"), first, math.inf)
    moments_bf16.run_all(common.Runs("training/moments_bf16"), plan, 0.0)
    assert made == list(first)
    moments_bf16.run_all(common.Runs("training/moments_bf16"), plan, math.inf)
    assert made == list(plan)
    assert len(plan) == 2 * len(SETTINGS)


def test_differences_are_those_of_an_optimizers_own_default() -> None:
    losses = dict(zip(SETTINGS, (5.0, 4.5, 4.0, 4.25, 6.0), strict=True))
    found = {
        moments_bf16.key(name, 4, seed): {"loss": loss + seed, "state_bytes": 1000}
        for name, loss in losses.items()
        for seed in range(2)
    }
    made = moments_bf16.rows(found, 4, 2)
    less = {name: row.get("less_base", {}).get("mean") for name, row in made.items()}
    assert list(less.values()) == [None, -0.5, None, 0.25, 2.0]
    assert made[ADAMW]["perplexity"] == pytest.approx(math.exp(5.5))
    text = tables.moments_bf16({"rows": made}).splitlines()
    assert text[2] == "| `optax.adamw` | 5.000, 6.000 | 244.7 | 1,000 bytes |  |  |  |"
    assert "| -0.5000 |" in text[3].replace("−", "-")
    del found[moments_bf16.key(ADAMW, 4, 1)]
    assert ADAMW not in moments_bf16.rows(found, 4, 2)
