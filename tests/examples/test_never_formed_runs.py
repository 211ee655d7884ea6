# SPDX-License-Identifier: Apache-2.0
"""Runs whose gradients are never formed, beside the same runs that form them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.examples.helpers import tiny

import metrics
from settings import Settings
from train import Trainer

NEVER = {"gradients": "never", "clip": 0.0}
# A basis that turns by rounding turns a step with it; plain SGD and an exact SVD keep
# both small, as for meshes in test_train.
RUN = {
    "optimizer": "galore_sgd",
    "options": ("rank=4", "update_proj_gap=2", "subspace=svd"),
    "learning_rate": 0.1,
    "steps": 5,
    "batch": 8,
    "eval_every": 0,
}


def losses(files: Path, out: Path, **changes: Any) -> list[float]:
    run = tiny(files, out, **(RUN | changes))
    return metrics.series(Trainer(run).train().records, "loss")[1]


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"remat": True, "mesh": ("data=2", "fsdp=2")},
        {"remat": True, "layerwise": True},
    ],
    ids=["plain", "remat on a mesh", "layerwise"],
)
def test_never_formed_is_the_same_run(
    files: Path, tmp_path: Path, shape: dict[str, Any]
) -> None:
    formed = losses(files, tmp_path / "formed", clip=0.0, **shape)
    never = losses(files, tmp_path / "never", **NEVER, **shape)
    assert formed[0] - formed[-1] > 1e-3  # it learns, and is compared while it does
    np.testing.assert_allclose(never, formed, rtol=1e-4)


def test_coordinates_of_parts_add_up_to_those_of_the_batch(
    files: Path, tmp_path: Path
) -> None:
    """On a step without a refresh; on one with, the first part decides the bases."""
    batch = np.random.default_rng(0).integers(0, 300, (8, 33), np.int32)
    batch[2, 5:] = batch[7, 20:] = -1  # parts have unequal numbers of tokens
    one, four = (
        tiny(files, tmp_path, **(RUN | NEVER), accumulation=count).program()
        for count in (1, 4)
    )
    state = one.init(one.init_params(0))
    coordinates = jax.jit(one.coordinates)
    opt_state = coordinates(state, one.put(batch))[2]
    state = state._replace(opt_state=optax.tree.set(opt_state, count=jnp.int32(1)))
    whole = coordinates(state, one.put(batch))[:2]
    parts = jax.jit(four.coordinates)(state, four.put(batch))[:2]
    # Sums of 8 * 32 terms in f32, in another order.
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=256 * 6e-8 * float(jnp.abs(a).max()))


def test_coordinates_are_clipped_by_their_own_norm(files: Path, tmp_path: Path) -> None:
    rate, largest = 0.1, 1e-3
    changes = {"clip": largest, "clip_projected": True, "warmup": 0.0}
    run = tiny(files, tmp_path, **(RUN | NEVER | changes))
    program = run.program()
    state = program.init(program.init_params(0))
    batch = np.random.default_rng(0).integers(0, 300, (8, 33), np.int32)
    before = jax.tree.map(np.asarray, state.params)
    after, found = jax.jit(program.update)(state, program.put(batch))
    assert float(found["gradient_norm"]) > largest
    step = jax.tree.map(lambda a, b: a - b, after.params, before)
    norm = float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(step))))
    # Projectors keep lengths, and galore's scale of 0.25 shortens; the rate is below
    # its peak at no step of a run without warm-up.
    assert 0.25 * rate * largest * 0.99 < norm < rate * largest * 1.01


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "word": ({"gradients": "none"}, "gradients='none' is not formed or never"),
    "layers": (
        NEVER | {"layerwise": True},
        "layerwise runs each layer again.* Add remat",
    ),
    "optimizer": (NEVER | {"optimizer": "adamw"}, "Take 'galore_adamw', or"),
    "norm": ({"gradients": "never"}, "clip=1.0 could measure. Add clip_projected"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_goes_with_no_such_run_is_refused(case: str) -> None:
    changes, message = REFUSED[case]
    options = () if case == "optimizer" else ("rank=4",)
    with pytest.raises(ValueError, match=message):
        Settings(options=options, **changes)
