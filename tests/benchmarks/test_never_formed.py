# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of what gradients that are never formed save; nothing is timed."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.lib import flops
from benchmarks.lib.training_steps import (
    FORMED,
    NEVER,
    abstract,
    loss_of,
    training_step,
)
from benchmarks.memory import hlo, never_formed, wire
from benchmarks.speed import never_formed as speed
from benchmarks.speed import tables
from galore_optax.memory import Method, Setting, Sizes

SIZES = Sizes.load("9m")
GALORE = Method("galore_adamw", (("rank", 8),))


def test_products_are_counted_in_loops_and_where_they_are_needed() -> None:
    x, weights = jnp.ones((5, 7)), jnp.ones((3, 7, 7))

    @jax.jit
    def loss(weights: Any) -> Any:
        @jax.checkpoint
        def layer(x: Any, w: Any) -> Any:
            x @ w  # nothing needs it
            return jnp.tanh(x @ w), None

        return jnp.sum(jax.lax.scan(layer, x, weights)[0])

    one = 2 * 5 * 7 * 7
    assert flops.of_products(loss, weights) == 3 * one
    # Once more in the backward pass, and two products there.
    assert flops.of_products(jax.grad(loss), weights) == 4 * 3 * one


def test_products_of_unknown_number_are_refused() -> None:
    def loop(x: Any, turns: Any) -> Any:
        return jax.lax.fori_loop(0, turns, lambda _, y: y @ x, x)

    with pytest.raises(ValueError, match="a while makes products"):
        flops.of_products(loop, jnp.ones((2, 2)), jnp.int32(3))


def test_what_is_saved_is_what_shapes_say() -> None:
    """`explain` counts the same products in another way; the rest is adamw's."""
    setting, found = Setting(24, 2), {}
    tx = GALORE.make()
    loss = loss_of(SIZES, remat=False)
    for gradients in (FORMED, NEVER):
        step = training_step(loss, tx, gradients, refresh=False)
        given = abstract(SIZES, tx, setting)
        found[gradients] = flops.of_products(step, *given)
    width, hidden, rank, layers = SIZES.width, SIZES.hidden, 8, SIZES.layers
    tokens, matrices = 48, [(width, width)] * 4 + [(width, hidden)] * 3
    formed = sum(2 * tokens * m * n + 2 * rank * m * n for m, n in matrices)
    never = sum(2 * tokens * rank * (m + n) for m, n in matrices)
    assert found[FORMED] - found[NEVER] == layers * (formed - never)


def test_gradients_are_found_in_a_program_and_coordinates_are_not() -> None:
    back = 'metadata={op_name="jit(step)/transpose(jvp())/dot_general"}'
    lines = [
        f"  %a = f32[128,384] dot(%x, %y), {back}",  # of queries, keys and values
        f"  %b = f32[4,352,128] dot(%x, %y), {back}",  # in four partial sums
        f"  %c = f32[8,128] dot(%x, %y), {back}",
        "  %d = f32[128,352] dot(%x, %y)",  # a lift
        f"  %e = f32[128,32000] dot(%x, %y), {back}",  # of the head
    ]
    text = "\n".join(["ENTRY %main (x: f32[1]) -> f32[1] {", *lines, "}"])
    found = never_formed.gradient_products(hlo.Program.parse(text), SIZES)
    assert [line.name for line in found] == ["a", "b"]


def test_bytes_of_a_loop_are_those_of_its_turns() -> None:
    text = """%body (s: f32[2]) -> f32[2] {
  %r = (f32[2,3], bf16[5]) all-reduce(%s, %t)
}

ENTRY %main (s: f32[2]) -> f32[2] {
  %one = f32[] all-reduce(%s)
  %w = f32[2] while(%s), body=%body, backend_config={"known_trip_count":{"n":"3"}}
}"""
    program = hlo.Program.parse(text)
    assert wire.reduced(program, program.entry) == 4 + 3 * (24 + 10)
    unknown = hlo.Program.parse(text.replace("known_trip_count", "trips"))
    with pytest.raises(ValueError, match="w: how often it reduces is not known"):
        wire.reduced(unknown, unknown.entry)


@pytest.mark.optimized
@pytest.mark.parametrize("gradients", [FORMED, NEVER])
def test_shapes_say_what_a_program_reduces(gradients: str) -> None:
    given = SIZES, GALORE.make(), Setting(16, wire.DEVICES, dtype="float32")
    expected = wire.from_shapes(*given, gradients)
    assert wire.in_program(*given, gradients) == expected


def made(tokens: int, ratio: float) -> dict[str, Any]:
    case = {"model": "60m", "layers": None, "vocab": 8, "remat": False, "rank": 128}
    rate = {"refresh_seconds": 0.5, "compile_seconds": 2.0}
    rows = {
        "optax.adamw": rate | {"tokens_per_second": 100.0},
        "formed": rate | {"tokens_per_second": 90.0},
        "never": rate | {"tokens_per_second": 100.0 * ratio},
    }
    return case | {"tokens": tokens, "rows": rows}


def test_the_curve_crosses_between_two_numbers_of_tokens() -> None:
    found = {"rows": [made(400, 1.1), made(100, 0.9), made(50, 0.8)]}
    assert tables.crossing(found) == pytest.approx(200)
    shown = tables.never_formed_speed(found).splitlines()[2]
    assert shown == (
        "| 60M | 8 | 400 | no | 100 | 90 | 110 | 0.900 | 1.100 | 0.50 | 0.50 | 1.00 |"
    )
    assert tables.crossing({"rows": [made(400, 1.1)]}) is None


def test_every_case_has_a_name_of_its_own() -> None:
    names = list(map(str, speed.cases()))
    assert len(set(names)) == len(names)
    assert names[0] == "60m, 8,192 entries, 2,048 tokens"
    assert speed.Case(tokens=128).batch().shape == (1, 129)


@pytest.mark.slow
def test_a_case_is_measured() -> None:
    row = speed.Case("9m", layers=1, vocab=64, tokens=16).measure(2, 1)
    assert set(row["rows"]) == set(speed.SUBJECTS)
    assert all(len(x["steady"]) == 2 for x in row["rows"].values())
