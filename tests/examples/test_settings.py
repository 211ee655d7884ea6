# SPDX-License-Identifier: Apache-2.0
"""What a run may be told, and what it refuses to be told."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from galore_optax import memory

import optimizers
import settings
from settings import Settings

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "optimizer": ({"optimizer": "galor_adamw"}, "Did you mean 'galore_adamw'"),
    "option": ({"options": ("rnak=3",)}, "'rnak' of 'galore_adamw'. Did you mean 'ra"),
    "form": ({"options": ("rank",)}, "'rank' is not of the form name=value"),
    "rank": ({"options": ("rank=0",)}, "rank=0 must be a positive int"),
    "subspace": ({"options": ("subspace=svdd",)}, "Did you mean 'svd'"),
    "accumulation": ({"batch": 6, "accumulation": 4}, "batch=6 cannot be divided"),
    "mesh": ({"batch": 6, "mesh": ("data=4",)}, "leaves 6\\s+sequences at a time"),
    "axis": ({"mesh": ("model=4",)}, "write data=N, fsdp=N, tensor=N or several"),
    "process": ({"processes": 2, "process": 2}, "process=2 of processes=2: they are n"),
    "coordinator": ({"processes": 2}, "processes=2 need coordinator=HOST:PORT"),
    "tokens": ({"tokens": 256}, "tokens=256 is more than the 128"),
    "model": ({"model": "130n"}, "Did you mean '130m'"),
    "corpus": ({"corpus": "pile"}, "known: prose, core, c4"),
    "layers and norm": (
        {"layerwise": True, "accumulation": 4},
        "never holds the whole\\s+gradient that clip=1.0",
    ),
    "projected norm": (
        {"clip_projected": True},
        "goes with layerwise or gradients=never",
    ),
    "nothing to diagnose": (
        {"diagnose_every": 5, "optimizer": "adamw", "options": ()},
        "adamw, which projects nothing. Take 'galore_adamw'",
    ),
    "diagnosed by layers": (
        {"diagnose_every": 5, "layerwise": True},
        "diagnose_every=5 forms all gradients",
    ),
    "steps": ({"steps": 0}, "steps=0 must be at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Settings(**changes)


def test_too_few_devices_are_said() -> None:
    with pytest.raises(ValueError, match="needs 64 devices, there are"):
        Settings(batch=64, mesh=("data=64",)).program()


def test_file_then_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'model = "9m"\ntokens = 256\nsteps = 7\n'
        "[options]\nrank = 8\nproj_type = 'left'\n[mesh]\ndata = 2\n"
    )
    run = settings.parse([str(path), "--steps", "9", "--remat", "--out", "elsewhere"])
    assert (run.model, run.steps, run.remat) == ("9m", 9, True)
    assert run.options == ("rank=8", "proj_type=left")
    assert run.axes == {"data": 2}
    assert run.out == Path("elsewhere")
    given = ["--options", "rank=4", "stagger=True", "--optimizer", "galore_lion"]
    assert settings.parse(given).options == ("rank=4", "stagger=True")


def test_unknown_words_are_refused_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text("step = 7\n")
    with pytest.raises(ValueError, match="unknown setting 'step'"):
        settings.parse([str(path)])
    with pytest.raises(SystemExit):
        settings.parse(["--step", "7"])
    assert "--steps" in "".join(capsys.readouterr())


ADAMS = {"adamw8bit", "galore_adamw8bit"}  # sgd has nothing to store in eight bits
NAMES = [x for x in memory.method_names() if not x.endswith("8bit") or x in ADAMS]


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_takes_a_step(name: str) -> None:
    params = {"layers": {"up": {"kernel": jnp.ones((2, 64, 96))}}, "norm": jnp.ones(4)}
    options = {"rank": 32} if "rank" in memory.option_names(name) else {}
    needs_key = {"key": 0} if "key" in memory.option_names(name) else {}
    tx = optimizers.make(name, 1e-3, options | needs_key)
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_muon_turns_each_matrix_of_a_stack_and_nothing_else() -> None:
    """A matrix of a stack gets what it would get alone, an embedding Adam's."""
    kernel = jax.random.normal(jax.random.key(0), (2, 6, 4))
    embedding = jnp.arange(-6.0, 6).reshape(4, 3)
    params = {"layers": {"up": {"kernel": kernel}}, "embedding": embedding}
    tx = optimizers.make("muon", 1.0, {"consistent_rms": 0.2})
    updates, state = tx.update(params, tx.init(params), params)
    alone = optax.contrib.muon(1.0, consistent_rms=0.2)
    for n in range(2):
        expected, _ = alone.update(kernel[n], alone.init(kernel[n]), kernel[n])
        found = updates["layers"]["up"]["kernel"][n]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    adam = optax.adam(1.0)
    expected, _ = adam.update(embedding, adam.init(embedding))
    np.testing.assert_array_equal(updates["embedding"], expected)
    numbers = sum(x.size for x in jax.tree.leaves(state) if x.ndim > 1)
    assert numbers == kernel.size + 2 * embedding.size
    with pytest.raises(TypeError, match="ns_step"):
        optimizers.make("muon", 1.0, {"ns_step": 3})


def test_differences_name_what_changed() -> None:
    saved = settings.to_json(Settings())
    assert not settings.differences(saved, Settings(out=Path("other"), keep=9))
    changed = Settings(learning_rate=1.0, model="9m", tokens=64)
    found = settings.differences(saved, changed)
    assert "learning_rate was 0.005, is 1.0" in found
    assert "model.vocab was 2048, is 32000" in found


def test_matrix_rate_scales_matrices_alone() -> None:
    params = {"layers": {"q": {"kernel": jnp.ones((2, 4, 4))}}, "norm": jnp.ones(4)}
    sgd = {"optimizer": "sgd", "options": (), "clip": 0.0, "warmup": 0.0}
    one, half = (
        Settings(**sgd, matrix_rate=rate).transformation() for rate in (1.0, 0.5)
    )
    (a, _), (b, _) = (tx.update(params, tx.init(params), params) for tx in (one, half))
    assert jnp.allclose(0.5 * a["layers"]["q"]["kernel"], b["layers"]["q"]["kernel"])
    assert jnp.allclose(a["norm"], b["norm"])


def test_at_matrix_rate_0_matrices_stay_and_have_no_state() -> None:
    params = {"layers": {"q": {"kernel": jnp.ones((2, 4, 4))}}, "norm": jnp.ones(5)}
    usual, fixed = (
        Settings(optimizer="adamw", options=(), clip=1.0, warmup=0.0, matrix_rate=rate)
        for rate in (1.0, 0.0)
    )
    tx = fixed.transformation()
    updates, state = tx.update(params, tx.init(params), params)
    assert not updates["layers"]["q"]["kernel"].any()
    assert {x.shape for x in jax.tree.leaves(state)} == {(), (5,)}

    norm = {"norm": params["norm"]}  # alone: clipping sees nothing of the fixed ones
    alone = usual.transformation()
    expected, _ = alone.update(norm, alone.init(norm), norm)
    assert jnp.array_equal(updates["norm"], expected["norm"])
