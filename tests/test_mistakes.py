# SPDX-License-Identifier: Apache-2.0
"""What users get wrong, and what they are told."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax as go
from galore_optax import layerwise
from tests.layered import MODEL, batches, parameters

PARAMS = {"attn": {"kernel": jnp.ones((64, 128))}, "b": jnp.ones(4)}
TX = go.galore(optax.adamw(1e-3), rank=16)
STATE = TX.init(PARAMS)
NARROW = go.galore(optax.adamw(1e-3), rank=16, moment_dtype=jnp.bfloat16)
EIGHT = go.galore_adamw8bit(1e-3, rank=32, weight_decay=1e-4)


def low() -> Any:
    return go.project_gradients(TX, PARAMS, STATE, PARAMS)[0]


def step_with(state: Any, data: Any) -> Any:
    step = layerwise.make_step(MODEL, go.galore_adamw(1e-3, rank=4))
    state = step.init(parameters()) if state is None else state
    return jax.eval_shape(step.update, parameters(), state, data)


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a state in f32 for eight bits": (
        lambda: EIGHT.update(
            PARAMS, go.galore_adamw(1e-3, rank=32).init(PARAMS), PARAMS
        ),
        ValueError,
        "floating dtype, and this optimizer keeps them in eight bits. .*convert_state",
    ),
    "a state in f32 for moments in bf16": (
        lambda: NARROW.update(PARAMS, STATE, PARAMS),
        ValueError,
        "'0/mu/attn/kernel' in float32, .* in bfloat16, by its moment_dtype. .*convert",
    ),
    "coordinates for gradients": (
        lambda: TX.update(low(), STATE, PARAMS),
        ValueError,
        r"'attn/kernel' has shape \(16, 128\).*update_projected",
    ),
    "a state for params": (
        lambda: go.describe(TX, STATE),
        ValueError,
        "a state of galore was given where params",
    ),
    "an optimizer for a learning rate": (
        lambda: go.galore_adamw(optax.adamw(1e-3), rank=16),  # type: ignore[arg-type]
        TypeError,
        "the learning rate of galore_adamw is a transformation",
    ),
    "an argument misspelt": (
        lambda: go.galore_adamw(1e-3, weight_decy=1),  # type: ignore[call-arg]
        TypeError,
        r"galore_adamw\(\) has no argument 'weight_decy'. Did you mean 'weight_decay'",
    ),
    "two projections in a chain": (
        lambda: go.chain(go.galore(rank=16), TX),
        ValueError,
        "would be projected again",
    ),
    "a pattern that decides nothing": (
        lambda: go.galore(optax.sgd(1.0), rank={".*": 16, "attn": 8}).init(PARAMS),
        ValueError,
        r"rank has the pattern 'attn' after '\.\*', which matches every leaf",
    ),
    "no regular expression": (
        lambda: go.galore(optax.sgd(1.0), rank={"(attn": 8}),
        re.error,
        r"rank has the pattern '\(attn'",
    ),
    "arguments in another order": (
        lambda: go.MultiSteps(4, TX),  # type: ignore[arg-type]
        TypeError,
        r"MultiSteps\(tx, every_k_schedule=4\)",
    ),
    "a state that is not by layers": (
        lambda: step_with(STATE, batches(0, 1)),
        TypeError,
        r"step\.init\(params\), not tx\.init",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_remedy_is_named(mistake: str) -> None:
    make, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message):
        make()


def test_a_batch_without_an_axis_of_micro_batches_gets_a_note() -> None:
    with pytest.raises(IndexError) as raised:
        step_with(None, batches(0, 1)[0])
    assert "counts micro-batches" in "".join(raised.value.__notes__)


@pytest.mark.parametrize("name", ["tok", "vocab"])
def test_a_table_of_tokens_is_an_embedding(name: str) -> None:
    params = {name: {"weight": jnp.ones((100, 16))}} | PARAMS
    rows = {row.path: row for row in go.describe(TX, params)}
    assert rows[f"{name}/weight"].rank == 0


def test_an_unfiltered_equinox_model_is_refused_by_all_that_need_shapes() -> None:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 8, 32, 1, key=jax.random.key(0))
    tx = go.galore_adamw(1e-3, rank=4)
    for ask in (
        lambda: tx.init(model),
        lambda: go.describe(tx, model),
        lambda: go.refresh_schedule(tx, model),
        lambda: go.convert_state((), tx, tx, model),
        lambda: go.state_shardings(tx, model),
        lambda: go.sharded(tx, model),
    ):
        with pytest.raises(TypeError, match=r"'activation' .*eqx\.is_inexact_array"):
            ask()
