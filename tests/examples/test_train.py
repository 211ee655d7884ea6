# SPDX-License-Identifier: Apache-2.0
"""Runs of a tiny model: steps, evaluation, resumption, devices, failures."""

import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.examples.helpers import LLAMA, assert_same_bits, opened, stop_after, tiny

import checkpoints
import metrics
import train
from data import PAD
from settings import Settings
from train import Trainer


def batch(rows: int, tokens: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 300, (rows, tokens + 1), np.int32)


def test_a_run_learns_and_records(files: Path, tmp_path: Path) -> None:
    run = tiny(files, tmp_path, steps=30, learning_rate=0.02)
    result = Trainer(run).train()
    losses = metrics.series(result.records, "loss")[1]
    assert losses[0] == pytest.approx(math.log(300), abs=0.1)
    assert losses[-1] < losses[0] - 1
    assert metrics.read(tmp_path / "metrics.jsonl") == result.records
    last = result.records[-1]
    assert math.exp(last["validation_loss"]) == pytest.approx(last["perplexity"])
    rates = metrics.series(result.records, "learning_rate")[1]
    assert rates[0] == 0
    assert max(rates) == pytest.approx(0.02)
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_what_a_projection_captures_is_recorded(files: Path, tmp_path: Path) -> None:
    run = tiny(files, tmp_path, steps=5, diagnose_every=2, log_every=2, eval_every=0)
    records = Trainer(run).train().records
    steps, energy = metrics.series(records, "projection/energy/layers/mlp/up/kernel")
    assert steps == [2, 4, 5]
    assert all(0 < value <= 1 for value in energy)
    # Renewed at the first step and at the fourth.
    assert metrics.series(records, "projection/age")[1] == [1, 0, 1]
    assert metrics.series(records, "gradient_norm")[0] == [1, 2, 4, 5]
    assert metrics.read(tmp_path / "metrics.jsonl") == records
    assert (tmp_path / "projection.png").stat().st_size > 10_000


def test_accumulation_changes_nothing_but_rounding(files: Path, tmp_path: Path) -> None:
    parts = batch(8)
    parts[2, 5:] = PAD  # parts have unequal numbers of tokens
    parts[7, 20:] = PAD
    found = []
    for accumulation in (1, 4):
        run = tiny(files, tmp_path, batch=8, accumulation=accumulation)
        program = run.program()
        params = program.init_params(0)
        found.append(program.gradients(params, program.put(parts)))
    (loss, one), (loss_4, four) = found
    assert float(loss) == pytest.approx(float(loss_4), rel=1e-6)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        # Sums of 8 * 32 terms in f32, in another order.
        np.testing.assert_allclose(a, b, atol=256 * 6e-8 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("accumulation", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_layerwise_is_the_same_step(
    files: Path, tmp_path: Path, accumulation: int
) -> None:
    assert_layerwise_is_the_same(tiny(files, tmp_path), accumulation)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 4])
def test_layerwise_is_the_same_step_on_a_mesh(
    files: Path, tmp_path: Path, accumulation: int
) -> None:
    mesh = ("data=2", "fsdp=1" if accumulation > 1 else "fsdp=4")
    base = tiny(files, tmp_path, mesh=mesh, batch=8)
    assert_layerwise_is_the_same(base, accumulation)


def test_layerwise_is_the_same_step_of_a_tied_model(
    grouped: Path, tmp_path: Path
) -> None:
    assert_layerwise_is_the_same(tiny(grouped, tmp_path), 1)


def assert_layerwise_is_the_same(base: Settings, accumulation: int) -> None:
    parts = batch(8)
    parts[2, 5:] = PAD
    rate = 1e-3
    options = {"optimizer": "sgd", "options": (), "batch": 8, "learning_rate": rate}
    found = []
    for layerwise in (False, True):
        clips = {"clip": 0.01, "clip_projected": layerwise and accumulation > 1}
        shape: Any = options | clips | {"accumulation": accumulation}
        run = dataclasses.replace(base, layerwise=layerwise, **shape)
        program = run.program()
        state = program.init(program.init_params(0))
        for _ in range(2):  # the first has a learning rate of zero
            state, metrics = jax.jit(program.update)(state, program.put(parts))
        found.append((state.params, metrics))
    (whole, of_whole), (by_layer, of_layers) = found
    for name, value in of_whole.items():
        assert float(of_layers[name]) == pytest.approx(float(value), rel=1e-5)
    # A step is at most the rate times the norm allowed; weights near 1 are rounded.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * rate * 0.01 + 1.2e-7),
        whole,
        by_layer,
    )


def test_the_loss_is_weighted_by_tokens(files: Path, tmp_path: Path) -> None:
    program = tiny(files, tmp_path).program()
    params = program.init_params(0)
    short, long = batch(2, seed=1), batch(2, seed=2)
    short[:, 4:] = PAD
    found = train.evaluate(jax.jit(program.loss), params, [short, long])
    sums = [program.loss(params, jnp.asarray(x)) for x in (short, long)]
    assert [int(count) for _, count in sums] == [6, 64]
    mean = sum(float(total) for total, _ in sums) / 70
    assert found["validation_loss"] == pytest.approx(mean)
    of_batches = sum(float(total) / int(count) for total, count in sums) / 3
    assert found["reference_perplexity"] == pytest.approx(math.exp(of_batches))


def test_a_perplexity_too_large_for_a_float_ends_no_run() -> None:
    assert train.perplexity(710.0) == math.inf
    assert train.perplexity(math.log(3.0)) == pytest.approx(3.0)


def test_every_part_of_a_batch_is_evaluated(files: Path, tmp_path: Path) -> None:
    with opened(tiny(files, tmp_path, accumulation=2)) as trainer:
        rows = [np.asarray(part) for part in trainer.held_out]
        np.testing.assert_array_equal(
            np.concatenate(rows), np.concatenate(trainer.text.held_out)
        )


@pytest.mark.slow
def test_padding_is_not_learnt_from(files: Path, tmp_path: Path) -> None:
    program = tiny(files, tmp_path).program()
    params = program.init_params(0)
    padded = batch(4)
    padded[:, 10:] = PAD
    one = program.gradients(params, program.put(padded))
    two = program.gradients(params, program.put(padded[:, :12]))  # one PAD is left
    assert float(one[0]) == pytest.approx(float(two[0]), rel=1e-6)
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(two[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(a).max()) + 1e-12)


@pytest.mark.parametrize(
    ("optimizer", "layerwise"),
    [
        pytest.param("adamw", False, marks=pytest.mark.slow),
        ("galore_adamw8bit", True),
        pytest.param("galore_adamw", False, marks=pytest.mark.slow),
    ],
)
def test_resuming_changes_no_bit(
    files: Path,
    tmp_path: Path,
    optimizer: str,
    layerwise: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: Any = ("rank=4", "update_proj_gap=3") if "galore" in optimizer else ()
    shape: Any = {"optimizer": optimizer, "options": options, "checkpoint_every": 5}
    shape |= {"layerwise": layerwise}
    whole = Trainer(tiny(files, tmp_path / "whole", **shape)).train()
    run = tiny(files, tmp_path / "cut", **shape)
    cut = Trainer(run)
    cut._pauses = stop_after(cut, 5)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = Trainer(run).train()
    assert "resuming" in capsys.readouterr().out
    assert_same_bits(whole.state, resumed.state)
    for name in ("loss", "validation_loss"):
        assert metrics.series(whole.records, name) == metrics.series(
            resumed.records, name
        )


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(files: Path, tmp_path: Path) -> None:
    run = tiny(files, tmp_path, checkpoint_every=4)
    first = Trainer(run).train()
    again = Trainer(run).train()
    assert_same_bits(first.state, again.state)
    assert again.records == first.records


def test_a_checkpoint_of_another_run_is_refused(files: Path, tmp_path: Path) -> None:
    Trainer(tiny(files, tmp_path, checkpoint_every=4, steps=4)).train()
    other = tiny(
        files, tmp_path, checkpoint_every=4, steps=4, options=("rank=2",), seed=1
    )
    message = r"options was \['rank=4'.*is \['rank=2'\]; seed was 0, is 1"
    with pytest.raises(ValueError, match=message):
        Trainer(other)


def test_only_the_last_checkpoints_are_kept(files: Path, tmp_path: Path) -> None:
    Trainer(tiny(files, tmp_path, checkpoint_every=2, keep=2)).train()
    kept = [p.name for p in (tmp_path / "checkpoints").iterdir()]
    assert sorted(kept) == ["6", "8"]


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(("data=4",), marks=pytest.mark.slow),
        pytest.param(("fsdp=4",), marks=pytest.mark.slow),
        pytest.param(("data=2", "fsdp=4"), marks=pytest.mark.slow),
        pytest.param(("fsdp=2", "tensor=2"), marks=pytest.mark.slow),
    ],
)
def test_a_mesh_changes_nothing_but_rounding(
    files: Path, tmp_path: Path, mesh: tuple[str, ...]
) -> None:
    shape = {"batch": 8, "steps": 5, "eval_every": 0, "optimizer": "galore_sgd"}
    options = ("rank=4", "update_proj_gap=2", "subspace=svd")
    shape |= {"options": options, "learning_rate": 0.1}
    one = Trainer(tiny(files, tmp_path / "one", **shape)).train()
    trainer = Trainer(tiny(files, tmp_path / "many", mesh=mesh, **shape))
    many = trainer.train()
    kernel = many.state.params["layers"]["mlp"]["up"]["kernel"]
    sizes = trainer.run.axes
    split = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    shards = {str(shard.index) for shard in kernel.addressable_shards}
    assert len(shards) == split
    a, b = (metrics.series(r.records, "loss")[1] for r in (one, many))
    np.testing.assert_allclose(a, b, rtol=1e-4)


@pytest.mark.slow
def test_a_meshed_run_resumes(files: Path, tmp_path: Path) -> None:
    shape = {"batch": 8, "checkpoint_every": 4, "mesh": ("data=2", "fsdp=4")}
    whole = Trainer(tiny(files, tmp_path, **shape)).train()
    with opened(tiny(files, tmp_path, **shape)) as again:
        assert_same_bits(whole.state, again.state)
        places = jax.tree.map(lambda x: x.sharding, whole.state.params)
        assert places == jax.tree.map(lambda x: x.sharding, again.state.params)


def test_export_of_a_run_and_a_start_from_it(files: Path, tmp_path: Path) -> None:
    import hugging_face

    run = tiny(files, tmp_path / "run", checkpoint_every=8)
    state = Trainer(run).train().state
    params, config = checkpoints.last_params(tmp_path / "run" / "checkpoints")
    assert config == run.config
    hugging_face.write(tmp_path / "hf", params, config)
    with opened(tiny(files, tmp_path / "next", init_from=tmp_path / "hf")) as start:
        assert_same_bits(start.state.params, state.params)


def test_a_log_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log = metrics.Log(tmp_path, 0, tensorboard=False)
    for step in range(1, 6):
        log.write(step, loss=float(step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    again = metrics.Log(tmp_path, 3, tensorboard=False)
    again.close()
    assert [r["step"] for r in metrics.read(tmp_path / "metrics.jsonl")] == [1, 2, 3]


@pytest.mark.slow
def test_tensorboard(files: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    Trainer(tiny(files, tmp_path, steps=2, eval_every=0, tensorboard=True)).train()
    assert any((tmp_path / "tensorboard").iterdir())


def command(run: Settings) -> list[str]:
    """The command line of a run."""
    names = ("model", "corpus", "c4_files", "tokenizer", "optimizer", "steps", "batch")
    names += ("tokens", "checkpoint_every", "log_every", "eval_every", "out")
    words = [sys.executable, str(LLAMA / "train.py")]
    for name in names:
        words += [f"--{name.replace('_', '-')}", str(getattr(run, name))]
    return [*words, "--options", *run.options]


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "",
    }


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import train
from checkpoints import Checkpoints
save = Checkpoints.save
def limited(self, step, *rest):
    if step > 4:  # from here on no file may grow beyond 2 KiB, as on a full disk
        self._finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
    save(self, step, *rest)
Checkpoints.save = limited
train.main()
"""


@pytest.mark.slow
def test_a_full_disk_is_said_and_costs_no_checkpoint(
    files: Path, tmp_path: Path
) -> None:
    run = tiny(files, tmp_path / "run", checkpoint_every=4, log_every=100)
    words = command(run)
    script = [sys.executable, "-c", LIMITED, *words[2:]]
    paths = environment(tmp_path / "cache") | {"PYTHONPATH": str(LLAMA)}
    done = subprocess.run(script, env=paths, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: could not write the checkpoint of step 8" in done.stderr
    assert "Steps 4 are there and whole." in done.stderr
    with opened(run) as left:
        assert int(left.state.step) == 4


@pytest.mark.slow
def test_ten_kills_change_no_bit(files: Path, tmp_path: Path) -> None:
    shape = {"steps": 220, "checkpoint_every": 4, "eval_every": 0}
    whole = tiny(files, tmp_path / "whole", **shape)
    killed = tiny(files, tmp_path / "killed", **shape)
    paths = environment(tmp_path / "cache")
    subprocess.run(command(whole), env=paths, check=True, capture_output=True)
    rng = np.random.default_rng()
    for number in range(10):
        target = 20 * number + int(rng.integers(5, 20))
        kill_at(command(killed), paths, killed.out / "metrics.jsonl", target)
    subprocess.run(command(killed), env=paths, check=True, capture_output=True)
    with opened(whole) as one, opened(killed) as two:
        assert int(two.state.step) == 220
        assert_same_bits(one.state, two.state)
        assert one.text.train.state() == two.text.train.state()
        losses = [metrics.series(t.log.records, "loss") for t in (one, two)]
    assert losses[0] == losses[1]


def kill_at(words: list[str], paths: dict[str, str], log: Path, target: int) -> None:
    """Starts a run and kills it, without warning, once it has logged step `target`."""
    with subprocess.Popen(
        words, env=paths, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None:
            records = metrics.read(log)
            if records and records[-1]["step"] >= target:
                process.kill()
        error = process.stderr.read().decode() if process.stderr else ""
    assert process.returncode == -9, error
