# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: what is projected, tiny runs of every method, what is refused."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import galore_optax
from tests.examples.finetune_helpers import (
    BERT,
    LIVELY,
    MPNET,
    classifier,
    inputs,
    logits,
)

import finetune
import weights
from batches import Batch, Encoded
from data import train_tokenizer
from encoder import Classifier, Config, Inputs
from finetune import Program, Texts, Trainer
from recipe import Recipe, parse

BOTH = pytest.mark.parametrize("config", [BERT, MPNET], ids=["bert", "mpnet"])
PROJECTED = {f"encoder/layers/attn/{x}/kernel" for x in "qkvo"} | {
    f"encoder/layers/mlp/{x}/kernel" for x in ("up", "down")
}


@BOTH
def test_galore_projects_the_maps_of_the_layers_alone(config: Config) -> None:
    model = nnx.eval_shape(lambda: Classifier(config, 2, nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    found = galore_optax.describe(Recipe().transformation(10), params)
    assert {leaf.path for leaf in found if leaf.rank} == PROJECTED
    assert all(leaf.reason == "stacked" for leaf in found if leaf.rank)
    kinds = {leaf.path: leaf.reason for leaf in found}
    assert kinds["encoder/embeddings/word/embedding"] == "embedding"
    assert kinds["encoder/embeddings/position/embedding"] == "embedding"
    assert kinds["head/dense/kernel"] == kinds["head/out/kernel"] == "head"
    if config.buckets:
        assert kinds["encoder/relative_bias/embedding"] == "embedding"
    assert not found.warnings


def signs(count: int, seed: int) -> Encoded:
    """Rows whose label is which of two words they hold."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count).astype(np.int32)
    tokens = [rng.integers(10, 50, rng.integers(4, 17)) for _ in range(count)]
    for row, label in zip(tokens, labels, strict=True):
        row[rng.integers(len(row))] = 5 + label
    types = [[0] * len(row) for row in tokens]
    return Encoded([list(map(int, row)) for row in tokens], types, labels)


TEXTS = Texts(signs(96, 0), signs(20, 1), signs(20, 2))
RATES = {"full": 3e-3, "galore": 3e-3, "lora": 1e-2}


def tiny(out: Path, method: str, **changes: Any) -> Recipe:
    options: Any = {"batch": 16, "epochs": 8, "update_proj_gap": 10} | changes
    return Recipe(method=method, learning_rate=RATES[method], out=out, **options)


def state_formula(method: str, config: Config, rank: int) -> tuple[int, int]:
    """Parameters trained, and bytes of Adam's and GaLore's arrays, in f32."""
    d, f, n = config.width, config.hidden, config.layers
    maps = [(d, d)] * 4 + [(d, f), (f, d)]
    head = d * d + d + 2 * d + 2
    if method == "lora":
        trained = n * sum(rank * (a + b) for a, b in maps) + head
        return trained, 8 * trained
    matrices = n * sum(a * b for a, b in maps)
    vectors = n * (4 * d + f + d + 4 * d) + 2 * d  # biases, two norms a layer; one
    rows = config.vocab + config.positions + config.types
    trained = matrices + vectors + rows * d + config.buckets * config.heads + head
    if method == "full":
        return trained, 8 * trained
    # A basis of the shorter side, two moments with the longer one.
    low_rank = n * sum(rank * (min(m) + 2 * max(m)) for m in maps)
    return trained, 8 * (trained - matrices) + 4 * low_rank


@pytest.mark.parametrize(
    "method",
    [pytest.param(x, marks=pytest.mark.slow) for x in ("galore", "lora", "full")],
)
def test_every_method_learns_and_stores_what_the_formula_says(
    method: str, tmp_path: Path
) -> None:
    model = classifier(BERT)
    result = Trainer(tiny(tmp_path, method), model, TEXTS).train()
    losses = [record["train_loss"] for record in result.records]
    assert losses[0] == pytest.approx(math.log(2), abs=0.1)
    assert losses[-1] < 0.6 * losses[0]
    assert result.records[-1]["step"] == 8 * 6
    trained, expected = state_formula(method, BERT, rank=4)
    assert result.trained == trained
    leaves = jax.tree.leaves(result.state.opt_state)
    assert sum(x.nbytes for x in leaves if x.dtype == jnp.float32) == expected
    assert 0 < result.state_bytes - expected < 200  # counters


@pytest.mark.slow
def test_frozen_parameters_stay_and_have_no_state(tmp_path: Path) -> None:
    trainer = Trainer(tiny(tmp_path, "lora"), classifier(BERT), TEXTS)
    program, batch = trainer.program, next(trainer._epoch())
    frozen = jax.tree.map(np.array, program.frozen)
    before = jax.tree.map(np.array, trainer.state.params)
    for _ in range(2):  # the first has a learning rate of zero
        trainer._update(batch)
    jax.tree.map(np.testing.assert_array_equal, frozen, program.frozen)
    assert set(before) == {"encoder", "head"}
    assert set(before["encoder"]) == {"layers"}
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), before, trainer.state.params
    )
    assert moved["encoder"]["layers"]["attn"]["q"]["b"]
    assert moved["head"]["dense"]["kernel"]


def test_adapters_change_nothing_at_first(tmp_path: Path) -> None:
    batch = inputs(BERT, (9, 16), 16)
    found = []
    for method in ("full", "lora"):
        model = classifier(BERT, LIVELY)
        program = Program(model, tiny(tmp_path, method), 10)
        found.append(program.logits(program.params, program.frozen, batch))
    # B is zero, but XLA fuses the sum, and rounds sums of a hundred terms elsewhere.
    np.testing.assert_allclose(*found, rtol=0, atol=100 * np.finfo(np.float32).eps)


@pytest.mark.slow
def test_a_run_depends_on_its_seed_alone(tmp_path: Path) -> None:
    def losses(seed: int) -> list[float]:
        recipe = tiny(tmp_path, "galore", seed=seed)
        trainer = Trainer(recipe, classifier(BERT), TEXTS)
        return [trainer._update(batch) for batch in trainer._epoch()]

    assert losses(1) == losses(1) != losses(2)


@pytest.mark.slow
def test_an_epoch_may_end_early(tmp_path: Path) -> None:
    recipe = tiny(tmp_path, "lora", epochs=2, epoch_rows=40)  # of 96: two batches
    trainer = Trainer(recipe, classifier(BERT), TEXTS)
    first, second = (list(trainer._epoch()) for _ in range(2))
    assert len(first) == len(second) == 2
    assert [b.inputs.tokens.tolist() for b in first] != [
        b.inputs.tokens.tolist() for b in second
    ]
    assert trainer.train().records[-1]["step"] == 4


def test_evaluation_is_over_all_rows(tmp_path: Path) -> None:
    model = classifier(BERT, LIVELY)
    found = Trainer(tiny(tmp_path, "full"), model, TEXTS).evaluate(TEXTS.dev)
    losses, right = [], []
    for tokens, label in zip(TEXTS.dev.tokens, TEXTS.dev.labels, strict=True):
        row = jnp.zeros((16, 16), int).at[0, : len(tokens)].set(jnp.asarray(tokens))
        lengths = jnp.ones(16, int).at[0].set(len(tokens))
        one = logits(model, Inputs(row, jnp.zeros_like(row), lengths))[0]
        losses.append(np.log(np.exp(one).sum()) - one[label])
        right.append(one.argmax() == label)
    assert found["metric"] == pytest.approx(np.mean(right))
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_schedule_and_gap() -> None:
    schedule = Recipe(learning_rate=1.0, warmup=0.1).schedule(100)
    assert [float(schedule(i)) for i in (0, 5, 10, 55, 100)] == pytest.approx(
        [0, 0.5, 1, 0.5, 0]
    )
    assert Recipe(epochs=30).gap == 500
    assert Recipe(epochs=2).gap == 33
    assert Recipe(epochs=2, update_proj_gap=7).gap == 7


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "task": ({"task": "mnli"}, "unknown task 'mnli'; known: cola, rte"),
    "method": ({"method": "dora"}, "unknown method 'dora'; known: full, galore, lora"),
    "model": ({"model": "bert"}, "unknown model 'bert'; known: minilm, mpnet"),
    "rank": ({"rank": 0}, "rank=0 must be at least 1"),
    "rate": ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
    "batch": ({"batch": -1}, "batch=-1 is negative"),
    "warmup": ({"warmup": 1.0}, "warmup=1.0 must be a share of 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(case: str) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = parse(["--task", "rte", "--glue-dir", "g", "--method", "lora"])
    assert (given.task, given.glue_dir, given.rows) == ("rte", Path("g"), 16)
    monkeypatch.setattr("sys.argv", ["finetune.py", "--task", "cola"])
    with pytest.raises(SystemExit, match=r"error: task 'cola' .* give --glue-dir"):
        finetune.main()


def test_rows_longer_than_the_model_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = weights.Pretrained(MPNET, {}, train_tokenizer(["low"], 260))
    monkeypatch.setattr(weights, "fetch", lambda _: found)
    monkeypatch.setattr(finetune.tasks, "load", lambda *_: None)
    with pytest.raises(ValueError, match="tokens=65 is more than the 64 that"):
        finetune.load(Recipe(tokens=65))


def test_only_compiled_steps_are_timed() -> None:
    clock, batch = finetune.Clock(), Batch(inputs(BERT, (3,), 16), np.zeros(1))
    for seconds in (100.0, 1.0, 3.0):
        clock.record(batch, seconds)
    clock.record(Batch(inputs(BERT, (3,), 32), np.zeros(1)), 100.0)
    assert clock.mean == 2.0
