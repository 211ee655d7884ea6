# SPDX-License-Identifier: Apache-2.0
"""What is compiled for cards that need not be there, and how programs are counted."""

import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks
from benchmarks.lib.shapes import Shapes
from benchmarks.memory import compiled_step, hlo, many_devices, targets
from galore_optax import memory
from galore_optax.memory import Method, Setting

SMALL = Shapes(32, 48, 2, vocab=64)

# A program as XLA prints it: a product and a fusion in a loop of three turns.
PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (p0: bf16[8,16], p1: bf16[8,16]) -> bf16[8,16] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  %wide = f32[8,16]{1,0} convert(%p0)
  ROOT %add = bf16[8,16]{1,0} add(%p0, %p1)
}

%body (s: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %s = (s32[], bf16[8,16]{1,0}) parameter(0)
  %x = bf16[8,16]{1,0} get-tuple-element(%s), index=1
  %wide.1 = f32[16,8]{0,1} fusion(%x), kind=kLoop, calls=%fused
  %gemm = (bf16[8,16]{1,0}, s8[64]{0}) custom-call(%x), custom_call_target="__cublas$gemm"
  %n = s32[] get-tuple-element(%s), index=0
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%n, %x)
}

%condition (s: (s32[], bf16[8,16])) -> pred[] {
  %s.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  ROOT %less = pred[] fusion(%s.1), kind=kLoop, calls=%fused
}

ENTRY %main (w: bf16[8,16]) -> bf16[8,16] {
  %w = bf16[8,16]{1,0} parameter(0)
  %copy.1 = bf16[8,16]{1,0} copy(%w)
  %c = (s32[], bf16[8,16]{1,0}) tuple(%w)
  %while.1 = (s32[], bf16[8,16]{1,0}) while(%c), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = bf16[8,16]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


# As XLA prints it for TPU: the condition says how many turns there are.
COUNTED = """HloModule jit_g, is_scheduled=true

%part (p: bf16[8,16]) -> bf16[32,16] {
  %p = bf16[8,16]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[32,16]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=2, dimensions={0}
}

%one (o: bf16[8,16]) -> bf16[8,16] {
  %o = bf16[8,16]{1,0} parameter(0)
  ROOT %all-to-all.1 = bf16[8,16]{1,0} all-to-all(%o), channel_id=1, dimensions={0}
}

%two (q: bf16[8,16]) -> bf16[8,16] {
  %q = bf16[8,16]{1,0} parameter(0)
  ROOT %all-to-all.2 = bf16[8,16]{1,0} all-to-all(%q), channel_id=1, dimensions={0}
}

%body (s: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %s = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%s), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%s), index=1
  %all-gather.1 = bf16[32,16]{1,0} all-gather(%x), channel_id=3, dimensions={0}
  %either = bf16[8,16]{1,0} conditional(%n, %x, %x), branch_computations={%one, %two}
  ROOT %t = (s32[], bf16[8,16]{1,0}) tuple(%n, %either)
}

%condition (c: (s32[], bf16[8,16])) -> pred[] {
  %eight = s32[]{:T(128)} constant(8)
  %c = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %eight), direction=LT
}

ENTRY %main (w: bf16[8,16]) -> bf16[32,16] {
  %w = bf16[8,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,16]{1,0}) tuple(%zero, %w)
  %while.1 = (s32[], bf16[8,16]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %fusion.1 = bf16[32,16]{1,0} fusion(%w), kind=kCustom, calls=%part
}
"""  # noqa: E501


def test_what_is_sent_is_counted_in_every_turn() -> None:
    """Eight gathers and one inside a fusion; in a turn one of two branches."""
    gathered, dealt = 2 * 32 * 16, 2 * 8 * 16
    found = many_devices.collectives(COUNTED)
    assert found == {"all-gather": 9 * gathered, "all-to-all": 8 * dealt}


def test_a_program_is_counted_as_it_runs() -> None:
    program = hlo.Program.parse(PROGRAM)
    found = compiled_step.counts(program, {(8, 16)})
    assert found == {
        "kernels": 4,  # copy, wide.1, gemm, less: none of the fusion's own
        "products": 1,
        "conditionals": 0,
        "loops": [{"depth": 0, "trips": 3, "kernels": 3}],
        "f32_arrays_of_leaf_size": 1,  # transposed or not
        "bf16_arrays_of_leaf_size": 2,
    }


def test_partial_sums_are_no_array_of_the_leaf() -> None:
    leaves = [(2, 32, 16)]
    assert hlo.Array("f32", (2, 16, 32)).is_like(leaves)
    assert hlo.Array("f32", (64, 1, 16)).is_like(leaves)
    assert not hlo.Array("f32", (2, 4, 8, 16)).is_like(leaves)
    assert not hlo.Array("f32", (2, 32, 32)).is_like(leaves)


def test_every_optimizer_is_compiled_for_every_target() -> None:
    made = list(map(str, compiled_step.counted()))
    assert len(made) == 2 * 7
    assert made[7:10] == [
        "h200, optax.adamw, steady",
        "h200, galore(adam), steady",
        "h200, galore(adam), refresh",
    ]
    assert compiled_step.projected(SMALL) == {(2, 32, 32), (2, 32, 48), (2, 48, 32)}


def test_a_step_is_compiled_for_a_card_that_is_not_there() -> None:
    try:
        targets.target("h200").device()
    except RuntimeError as error:
        pytest.skip(str(error))
    case = compiled_step.Counted("h200", "galore(adam)", False)
    found = case.measure(Shapes(256, 512, 2, vocab=256), 64)
    assert found["f32_arrays_of_leaf_size"] == 0
    assert found["products"] == 14
    assert not found["loops"]


def test_every_rank_and_optimizer_is_compiled() -> None:
    found = list(map(str, compiled_step.held("7b")))
    assert found == [
        "7b, optax.adamw",
        *(f"7b, galore_adamw, rank {rank}" for rank in (256, 512, 1024, 2048)),
        "7b, galore_adamw8bit, rank 1024",
        "7b, optax.contrib.galore, rank 1024",
    ]


def test_outputs_that_are_not_donated_are_held_too() -> None:
    row = {"arguments": 10, "temporaries": 5, "not_donated": 1}
    assert compiled_step.total(row) == 16


RESULTS = Path(benchmarks.__file__).parent / "results" / "memory"
FOUND = json.loads((RESULTS / "never_formed_bytes.json").read_text())["result"]
CASES = [(row["case"], row["total"], row["temporaries"]) for row in FOUND["rows"]]


@pytest.mark.parametrize(("case", "total", "temporaries"), CASES, ids=str)
def test_the_planner_knows_what_steps_of_every_kind_hold(
    case: dict[str, Any], total: int, temporaries: int
) -> None:
    rank = (("rank", 1024),) if case["method"].startswith("galore") else ()
    kind, counts = case["gradients"], (case["tokens"], 1, case["accumulation"])
    setting = Setting(
        *counts,
        remat=True,
        layerwise=kind == "layerwise",
        gradients="never" if kind == "never" else "formed",
        refresh_shares=case["shares"],
    )
    plan = memory.plan("7b", Method(case["method"], rank), setting)
    phases = [x for x in plan.phases if case["refresh"] or x.name != "refresh"]
    peak = max(x.total for x in phases)
    # 2 % of the whole, 6 % of what is made in a step. Not modelled: the refresh of a
    # layer, and what is kept between shares of one.
    most = 0.02 if case["shares"] == 1 else 0.04
    assert plan.weights + plan.state.total + peak == pytest.approx(total, rel=most)
    if kind != "layerwise" and case["shares"] == 1:
        assert peak == pytest.approx(temporaries, rel=0.06)
