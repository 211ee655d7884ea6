# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of eight devices, restored on other meshes."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.examples.helpers import assert_same_bits, opened, stop_after, tiny

import metrics
from train import Result, Trainer

pytestmark = pytest.mark.slow

RUN: dict[str, Any] = {
    "batch": 8,
    "steps": 8,
    "eval_every": 0,
    "checkpoint_every": 4,
    "optimizer": "galore_adamw8bit",
}
EIGHT = ("data=2", "fsdp=4")
MESHES = {
    "four": ("fsdp=4",),
    "two": ("fsdp=2",),
    "one": (),
    "tensor": ("tensor=4",),
    "all axes": ("data=2", "fsdp=2", "tensor=2"),
}


@pytest.fixture(scope="module")
def saved(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """The folder of a run on eight devices, and what it left."""
    folder = tmp_path_factory.mktemp("eight")
    return folder, Trainer(tiny(files, folder, mesh=EIGHT, **RUN)).train()


@pytest.mark.parametrize("name", MESHES)
def test_a_checkpoint_of_eight_devices_moves(
    files: Path, saved: tuple[Path, Result], name: str
) -> None:
    folder, whole = saved
    with opened(tiny(files, folder, mesh=MESHES[name], **RUN)) as again:
        assert again.first == 8
        assert_same_bits(whole.state, again.state)
        program = again.program
        fresh = program.init(program.init_params(0))
        for expected, found in zip(
            jax.tree.leaves(fresh), jax.tree.leaves(again.state), strict=True
        ):
            assert found.sharding == expected.sharding


def test_the_curve_goes_on_on_another_mesh(files: Path, tmp_path: Path) -> None:
    # Plain steps in the subspace: the update depends on the span of a basis alone.
    plain = {"optimizer": "galore_sgd", "learning_rate": 0.1}
    options = ("rank=4", "update_proj_gap=3", "subspace=svd")
    run: dict[str, Any] = RUN | plain | {"options": options, "mesh": EIGHT}
    whole = Trainer(tiny(files, tmp_path / "whole", **run)).train()
    cut = Trainer(tiny(files, tmp_path / "cut", **run))
    cut._pauses = stop_after(cut, 4)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    run["mesh"] = ("tensor=2",)
    resumed = Trainer(tiny(files, tmp_path / "cut", **run)).train()
    a, b = (metrics.series(r.records, "loss")[1] for r in (whole, resumed))
    assert len(a) == len(b) == 8
    # A loss is a mean over 8 · 32 tokens, summed in another order.
    np.testing.assert_allclose(a, b, rtol=8 * 32 * 6e-8)


def test_the_state_of_another_optimizer_is_refused(
    files: Path, saved: tuple[Path, Result]
) -> None:
    other = tiny(files, saved[0], mesh=(), **RUN | {"optimizer": "galore_adamw"})
    message = "optimizer was 'galore_adamw8bit', is 'galore_adamw'"
    with pytest.raises(ValueError, match=message):
        Trainer(other)
