# SPDX-License-Identifier: Apache-2.0
"""LoRA, ReLoRA and factors: what is trained, merged, restarted, saved and refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.examples.helpers import LLAMA, assert_same_bits, stop_after, tiny

import adapters
import hugging_face
import metrics
import relora
from adapted import Adapter
from checkpoints import Checkpoints, last_params
from model import parameter_count
from settings import Settings
from steps import State, state_bytes
from train import Trainer

RANK, ALPHA = 4, 32.0
# Of the tiny model: width, hidden, layers, vocabulary.
D, F, L, V = 16, 24, 2, 300
FACTORS = L * RANK * (4 * (D + D) + 3 * (D + F))
OTHERS = 2 * V * D + (2 * L + 1) * D
MATRICES = L * (4 * D * D + 3 * D * F)
ADAM: dict[str, Any] = {
    "optimizer": "adamw",
    "options": ("weight_decay=0.1",),
    "adapter_rank": RANK,
    "learning_rate": 0.02,
}
LORA: dict[str, Any] = ADAM | {"adapter": "lora"}
RELORA: dict[str, Any] = ADAM | {
    "adapter": "relora",
    "adapter_reset": 3,
    "adapter_warmup": 2,
}
BA: dict[str, Any] = ADAM | {"adapter": "factors"}
EPS = 2.0**-24  # rounding in f32


def batch(rows: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, V, (rows, 33), np.int32)


class Run:
    """A run's functions, compiled once, and its state."""

    def __init__(self, run: Settings):
        self.program = run.program()
        self.state = self.program.init(self.program.init_params(run.seed))
        self.update, self._loss = self.program.compiled(self.state)

    def advance(self, steps: int) -> "Run":
        for number in range(steps):
            parts = self.program.put(batch(seed=number))
            self.state, _ = self.update(self.state, parts)
        return self

    def loss(self, params: Any) -> float:
        total, count = self._loss(params, batch())
        return float(total) / int(count)


def named(tree: Any) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in leaves}


@pytest.fixture(scope="module")
def plain(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The model without adapters, at its start."""
    return Run(tiny(files, tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def lora(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """LoRA at its start."""
    return Run(tiny(files, tmp_path_factory.mktemp("lora"), **LORA))


@pytest.fixture(scope="module")
def trained(lora: Run) -> State:
    """LoRA after five steps."""
    first = lora.state
    lora.state = jax.tree.map(jnp.copy, first)  # steps consume theirs
    last = lora.advance(5).state
    lora.state = first
    return last


def test_a_fresh_adapter_changes_neither_kernels_nor_outputs(
    plain: Run, lora: Run
) -> None:
    bases = adapters.map_maps(lambda part: part["base"], lora.state.params)
    assert_same_bits(bases, plain.state.params)
    loss = plain.loss(plain.state.params)
    assert lora.loss(lora.state.params) == pytest.approx(loss, rel=4 * EPS)


def test_the_merged_model_computes_the_same(
    plain: Run, lora: Run, trained: State
) -> None:
    merged = adapters.merged(trained.params, ALPHA)
    assert jax.tree.structure(merged) == jax.tree.structure(plain.state.params)
    loss = lora.loss(trained.params)
    # The mean of 128 losses, each by some ten products of at most 24 terms in a row.
    assert plain.loss(merged) == pytest.approx(loss, rel=10 * 24 * EPS)
    bases = adapters.map_maps(lambda part: part["base"], trained.params)
    assert plain.loss(bases) != pytest.approx(loss, rel=1e-3)
    assert_same_bits(adapters.merged(merged, 0.0), merged)


def test_frozen_kernels_stay_and_all_else_moves(lora: Run, trained: State) -> None:
    old, new = named(lora.state.params), named(trained.params)
    frozen = {name for name in old if "/base/" in name}
    assert len(frozen) == 7
    for name, value in old.items():
        same = np.array_equal(value, new[name])
        assert same == (name in frozen), name


def test_only_what_is_trained_has_state(trained: State) -> None:
    assert parameter_count(trained.params) == MATRICES + FACTORS + OTHERS
    assert adapters.trained_count(trained.params) == FACTORS + OTHERS
    counters = 2 * 4  # of Adam and of the schedule
    assert state_bytes(trained.opt_state) == 2 * 4 * (FACTORS + OTHERS) + counters
    assert not any("/base/" in name for name in named(trained.opt_state))


def test_frozen_kernels_do_not_count_in_the_norm(lora: Run, trained: State) -> None:
    program = lora.program
    gradients = jax.jit(program.gradients)(trained.params, program.put(batch()))[1]
    found = named(gradients)
    assert all(x.any() == ("/base/" not in name) for name, x in found.items())


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw8bit", "adafactor", "lion"])
def test_other_optimizers(files: Path, tmp_path: Path, optimizer: str) -> None:
    changes: Any = LORA | {"optimizer": optimizer, "options": ()}
    run = Run(tiny(files, tmp_path, **changes))
    first = jax.tree.map(np.asarray, run.state.params)
    run.advance(4)
    for name, value in named(first).items():
        same = np.array_equal(value, named(run.state.params)[name])
        assert same == ("/base/" in name), name


def test_factors_start_at_the_best_approximation(
    files: Path, tmp_path: Path, plain: Run
) -> None:
    state = Run(tiny(files, tmp_path, **BA)).state
    assert parameter_count(state.params) == FACTORS + OTHERS
    assert state_bytes(state.opt_state) == 2 * 4 * (FACTORS + OTHERS) + 8
    found = named(adapters.merged(state.params, ALPHA))
    for name, kernel in named(plain.state.params["layers"]).items():
        if not name.endswith("kernel"):
            continue
        u, s, vt = np.linalg.svd(np.asarray(kernel, np.float64))
        best = (u[..., :, :RANK] * s[..., None, :RANK]) @ vt[..., :RANK, :]
        # Singular vectors turn by rounding over the gap between singular values.
        gap = np.min(s[..., RANK - 1] - s[..., RANK])
        tolerance = 100 * EPS * np.max(s) ** 2 / gap
        assert tolerance < 0.01 * np.abs(best).max()
        np.testing.assert_allclose(found[f"layers/{name}"], best, atol=tolerance)
        rest = np.linalg.norm(np.asarray(kernel) - best)
        assert rest > 0.3 * np.linalg.norm(kernel)  # or rank would not matter


def test_factors_share_the_singular_values() -> None:
    kernel = jax.random.normal(jax.random.key(0), (3, 8, 5))
    a, b = adapters.best_factors(kernel, 2)
    lengths = jnp.linalg.norm(a, axis=-2), jnp.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(*lengths, rtol=1e-5)


@pytest.fixture(scope="module")
def restarted(trained: State) -> State:
    """What ReLoRA's restart makes of LoRA after five steps."""
    return jax.jit(Adapter("relora", RANK, ALPHA, reset=3).restart)(trained)


def test_a_restart_keeps_the_function_and_begins_anew(
    lora: Run, trained: State, restarted: State
) -> None:
    loss = lora.loss(trained.params)
    assert lora.loss(restarted.params) == pytest.approx(loss, rel=240 * EPS)
    old, new = named(trained.params), named(restarted.params)
    for name, value in new.items():
        moved = name.endswith(("/a", "/b", "/base/kernel"))
        assert np.array_equal(value, old[name]) != moved, name
        if name.endswith("/b"):
            assert not value.any()
        if name.endswith("/a"):  # drawn as at first: uniform within ±1/√in
            bound = value.shape[-2] ** -0.5
            assert 0.8 * bound < float(jnp.abs(value).max()) <= bound
    layers = new["layers/attn/q/a"]
    assert not np.array_equal(layers[0], layers[1])
    assert not np.array_equal(layers, new["layers/attn/k/a"])


def test_a_restart_prunes_the_moments_of_adapters(
    trained: State, restarted: State
) -> None:
    old, new = named(trained.opt_state), named(restarted.opt_state)
    pruned = {name for name in old if name.endswith(("/a", "/b"))}
    assert len(pruned) == 2 * 2 * 7
    for name in old.keys() - pruned:
        np.testing.assert_array_equal(new[name], old[name], name)
    for name in pruned:
        for one, two in zip(np.asarray(old[name]), np.asarray(new[name]), strict=True):
            kept = two != 0
            assert kept.sum() == np.ceil((1 - relora.PRUNED) * (one.size - 1)), name
            np.testing.assert_array_equal(two[kept], one[kept])
            if "/mu/" in name:
                assert np.abs(one[kept]).min() > np.abs(one[~kept]).max()
                second = new[name.replace("/mu/", "/nu/")]
                np.testing.assert_array_equal(new[name] != 0, second != 0)


def test_a_restart_leaves_no_moment_to_be_divided_by_eps(restarted: State) -> None:
    """The next updates of A, which has no gradient while B is zero, are small.

    By Cauchy and Schwarz |m| = (1 - b1) |Σ b1^i g_i| is at most
    (1 - b1) √(Σ (b1² / b2)^i) √(Σ b2^i g_i²), the last root being √(v / (1 - b2)).
    """
    leaves = jax.tree.leaves(restarted.opt_state, is_leaf=relora._is_adam)
    (adam,) = filter(relora._is_adam, leaves)
    no_gradient = jax.tree.map(jnp.zeros_like, adam.mu)
    updates, _ = optax.scale_by_adam().update(no_gradient, adam)
    b1, b2, steps = 0.9, 0.999, int(adam.count)
    m_over_v = (1 - b1) * sum((b1**2 / b2) ** i for i in range(steps)) ** 0.5
    m_over_v /= (1 - b2) ** 0.5
    decayed = (b1 / (1 - b1 ** (steps + 1))) / (b2 / (1 - b2 ** (steps + 1))) ** 0.5
    for name, update in named(updates).items():
        if name.endswith(("/a", "/b")):
            assert float(jnp.abs(update).max()) <= decayed * m_over_v * 1.0001, name


@pytest.mark.slow
def test_restarts_come_when_they_are_due(files: Path, tmp_path: Path) -> None:
    run = Run(tiny(files, tmp_path, **RELORA))
    drawn = set()
    for step in range(1, 8):
        run.advance(1)
        part = run.state.params["layers"]["attn"]["q"]
        # The step after a restart has a rate of zero.
        assert bool(part["b"].any()) == (step not in (3, 4, 6, 7)), step
        drawn.add(np.asarray(part["a"]).tobytes() if step % 3 == 0 else b"")
    assert len(drawn) == 1 + 2


def test_the_rate_is_jagged() -> None:
    shape: Any = {"steps": 100, "learning_rate": 1.0, "warmup": 0.1}
    changes: Any = {"adapter_reset": 20, "adapter_warmup": 5}
    smooth = Settings(**shape).schedule()
    found = Settings(**RELORA | shape | changes).schedule()
    for step in range(100):
        since = step % 20
        share = 1.0 if step < 20 else min(since / 5, 1.0)
        assert float(found(step)) == pytest.approx(share * float(smooth(step)))


@pytest.mark.parametrize("kind", [LORA, BA])
def test_matrix_rate_is_that_of_the_factors(
    files: Path, tmp_path: Path, kind: dict[str, Any]
) -> None:
    sgd: Any = kind | {"optimizer": "sgd", "options": (), "clip": 0.0, "warmup": 0.0}
    one, half = (tiny(files, tmp_path, **sgd, matrix_rate=x) for x in (1.0, 0.5))
    program = one.program()
    shapes = jax.eval_shape(lambda: program.init_params(0))
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    txs = [run.transformation() for run in (one, half)]
    found = [named(tx.update(ones, tx.init(ones), ones)[0]) for tx in txs]
    for name, value in found[0].items():
        if "/base/" not in name:
            share = 0.5 if name.endswith(("/a", "/b")) else 1.0
            np.testing.assert_allclose(found[1][name], share * value, err_msg=name)


def saved(state: State, settings: Settings, step: int) -> Checkpoints:
    found = Checkpoints(settings.out / "checkpoints", 1)
    found.save(step, state, {}, settings)
    return found


def test_a_restored_state_has_the_same_bits(
    files: Path, tmp_path: Path, lora: Run, restarted: State
) -> None:
    settings = tiny(files, tmp_path, **RELORA)
    checkpoints = saved(restarted, settings, 5)
    assert_same_bits(checkpoints.restore(lora.state, settings).state, restarted)
    other = tiny(files, tmp_path, **RELORA | {"adapter_rank": 2})
    with pytest.raises(ValueError, match="adapter_rank was 4, is 2"):
        checkpoints.restore(lora.state, other)
    checkpoints.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [LORA, RELORA, BA])
def test_resuming_changes_no_bit(
    files: Path, tmp_path: Path, kind: dict[str, Any]
) -> None:
    shape: Any = kind | {"checkpoint_every": 5}
    whole = Trainer(tiny(files, tmp_path / "whole", **shape)).train()
    run = tiny(files, tmp_path / "cut", **shape)
    cut = Trainer(run)
    cut._pauses = stop_after(cut, 5)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = Trainer(run).train()
    assert_same_bits(whole.state, resumed.state)
    losses = [metrics.series(x.records, "loss") for x in (whole, resumed)]
    assert losses[0] == losses[1]


def test_what_is_exported_is_merged(
    files: Path, tmp_path: Path, plain: Run, lora: Run, trained: State
) -> None:
    run = tiny(files, tmp_path / "run", **LORA)
    saved(trained, run, 5).close()
    params, config = last_params(run.out / "checkpoints")
    hugging_face.write(tmp_path, params, config)
    back = hugging_face.read(tmp_path, config)
    loss = lora.loss(trained.params)
    assert plain.loss(back) == pytest.approx(loss, rel=240 * EPS)
    # And in again, as a run with `init_from` does.
    adapted = lora.program.place(back)
    assert lora.loss(adapted) == pytest.approx(loss, rel=240 * EPS)
    assert not adapted["layers"]["attn"]["q"]["b"].any()


@pytest.mark.slow
def test_several_devices_compute_the_same(files: Path, tmp_path: Path) -> None:
    one, many = (
        Run(tiny(files, tmp_path, **RELORA, mesh=mesh))
        for mesh in ((), ("data=2", "fsdp=2"))
    )
    assert_close(one.state.params, many.state.params)
    state = one.advance(2).state
    shardings = jax.tree.map(lambda x: x.sharding, many.state)
    placed = jax.device_put(jax.tree.map(jnp.copy, state), shardings)
    restarts = [jax.jit(run.program.adapter.restart) for run in (one, many)]
    assert_close(restarts[0](state), restarts[1](placed))
    parts = [run.program.put(batch(seed=2)) for run in (one, many)]
    found = [one.update(state, parts[0])[1], many.update(placed, parts[1])[1]]
    for name, value in found[0].items():
        assert float(found[1][name]) == pytest.approx(float(value), rel=240 * EPS)


def assert_close(one: Any, two: Any) -> None:
    """To rounding of sums of at most 24 terms."""
    for name, x in named(one).items():
        y, largest = np.asarray(named(two)[name]), float(jnp.abs(x).max())
        np.testing.assert_allclose(y, x, atol=24 * EPS * largest, err_msg=name)


@pytest.mark.slow
def test_the_program_says_what_is_trained(files: Path, tmp_path: Path) -> None:
    words = [sys.executable, str(LLAMA / "train.py"), "--model", files / "tiny.json"]
    words += ["--corpus", "c4", "--c4-files", files, "--tokens", "32", "--steps", "2"]
    words += ["--tokenizer", files / "tokenizer.json", "--out", tmp_path]
    words += ["--optimizer", "adamw", "--adapter", "lora", "--adapter-rank", "4"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    count, part = MATRICES + FACTORS + OTHERS, FACTORS + OTHERS
    assert f"{count:,} parameters, {part:,} of them trained" in done.stdout
