# SPDX-License-Identifier: Apache-2.0
"""What a description counts, folds, explains and warns of."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import galore_optax as go
from galore_optax._asking.fold import fold

LR = 0.1
PARAMS = {
    "embedding": jnp.ones((40, 16)),
    "layers": {
        "up": {"kernel": jnp.ones((3, 16, 48)), "bias": jnp.ones((3, 48))},
        "norm": {"scale": jnp.ones((3, 16))},
    },
    "w": jnp.ones((24, 16)),
}
COUNTERS = 8  # bytes a matrix: of its last refresh, and of refusals


def block(dtype: Any = jnp.float32) -> Any:
    """Shapes of one layer: 64 to 128 and back."""
    shapes = {
        "up": {"kernel": (64, 128), "bias": (128,)},
        "down": {"kernel": (128, 64)},
    }
    return of_shapes(shapes | {"norm": {"scale": (64,)}}, dtype)


def of_shapes(shapes: Any, dtype: Any = jnp.float32) -> Any:
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, dtype),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def adam(rank: int = 4, **options: Any) -> Any:
    return go.galore(optax.adam(LR), rank=rank, **options)


def bytes_of(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def only(texts: tuple[str, ...], start: str) -> str:
    (found,) = (text for text in texts if text.startswith(start))
    return found


def test_leaves_and_bytes() -> None:
    tx = optax.chain(optax.clip(1.0), go.galore_adamw(LR, rank=4))
    report = go.describe(tx, jax.eval_shape(lambda: PARAMS))
    assert report.state_bytes == bytes_of(tx.init(PARAMS))
    assert report.adam_bytes == bytes_of(optax.adam(1.0).init(PARAMS))
    assert report.adam_f32_bytes == report.adam_bytes
    kernel = next(leaf for leaf in report if leaf.path == "layers/up/kernel")
    assert (kernel.matrix, kernel.side, kernel.rank) == ("3 x (48x16)", "right", 4)
    assert kernel.state_bytes == 4 * 3 * (16 * 4 + 2 * 48 * 4) + 3 * COUNTERS
    assert kernel.adam_bytes == 4 * 2 * 3 * 16 * 48
    text = str(report)
    for leaf in report:
        assert leaf.path in text
    assert report.warnings == ()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_yardstick_is_the_state_of_optax(dtype: str) -> None:
    params = block(dtype)
    report = go.describe(adam(), params)
    wide = jax.tree.map(lambda x: x.update(dtype=jnp.float32), params)
    for make in (optax.adam, optax.adamw):
        assert report.adam_bytes == bytes_of(jax.eval_shape(make(LR).init, params))
        assert report.adam_f32_bytes == bytes_of(jax.eval_shape(make(LR).init, wide))
    assert sum(leaf.adam_bytes for leaf in report) + 4 == report.adam_bytes
    assert sum(leaf.adam_f32_bytes for leaf in report) + 4 == report.adam_f32_bytes


def test_another_trace_of_init_changes_nothing() -> None:
    tx, params = adam(rank=2), {"w": jnp.ones((8, 12))}
    jax.eval_shape(tx.init, params)
    assert str(go.describe(tx, params)) == str(go.describe(tx, params))


def test_leaves_outside_galore_are_described() -> None:
    tx = optax.masked(adam(), {"embedding": False, "layers": True, "w": True})
    report = go.describe(tx, PARAMS)
    assert {x.path: x for x in report}["embedding"].reason == "outside galore"
    # Vectors, though stacked, are no matrices.
    total = 40 * 16 + 3 * 16 * 48 + 24 * 16
    assert report.unprojected == {"outside galore": 40 * 16 / total}


@pytest.mark.parametrize(
    "options",
    [{}, {"proj_type": "full"}, {"projector_dtype": jnp.int8}],
    ids=["one side", "two sides", "coded projectors"],
)
@pytest.mark.parametrize("make", [go.galore_adamw, go.galore_adamw8bit])
def test_every_array_but_counters_belongs_to_a_leaf(make: Any, options: Any) -> None:
    # Paths that end alike, and names that the state's own fields have.
    names = ("kernel", "a/kernel", "mu", "projector/kernel", "codes", "0", "last")
    params = of_shapes(dict.fromkeys(names, (128, 96)) | {"list": [(128, 96)] * 3})
    report = go.describe(make(LR, rank=32, **options), params)
    sizes = {leaf.state_bytes for leaf in report}
    assert len(sizes) == 1
    assert (
        0 <= report.state_bytes - len(report.leaves) * sizes.pop() < 200
    )  # counters, a key


@pytest.mark.parametrize("make", [go.galore_adamw, go.galore_adamw8bit])
def test_boxes_hold_what_their_leaves_hold(make: Any) -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.embed = nnx.Embed(100, 64, rngs=nnx.Rngs(0))
            self.up = nnx.Linear(64, 128, rngs=nnx.Rngs(0))

    boxed = nnx.state(nnx.eval_shape(Model), nnx.Param)
    plain = nnx.to_pure_dict(boxed)
    ours, theirs = (
        {leaf.path: leaf.state_bytes for leaf in go.describe(make(LR, rank=32), params)}
        for params in (boxed, plain)
    )
    assert ours == theirs
    assert min(ours.values()) > 0


def test_shares_of_matrices_at_full_size() -> None:
    shapes = {"embed": (100, 8), "head": {"kernel": (8, 50)}, "odd": (2, 3, 5)}
    params = of_shapes(shapes | {"up": {"kernel": (8, 64)}, "norm": {"scale": (8,)}})
    report = go.describe(adam(), params)
    total = 100 * 8 + 8 * 50 + 30 + 8 * 64
    expected = {"embedding": 800 / total, "head": 400 / total}
    assert report.unprojected == expected | {"unknown layout": 30 / total}
    assert list(report.unprojected) == ["embedding", "head", "unknown layout"]
    assert "\nnot projected: 70.6% of the matrix parameters (45.9%" in str(report)


def test_equal_layers_take_one_line() -> None:
    params = {"blocks": [block() for _ in range(5)]}
    report = go.describe(adam(), params)
    assert len(list(report)) == 5 * 4
    lines = str(report).splitlines()
    (line,) = (x for x in lines if "up/kernel" in x)
    one = 4 * (64 * 4 + 2 * 128 * 4) + COUNTERS
    assert line.startswith("blocks/{0..4}/up/kernel    64x128")
    assert f"{5 * one / 1000:.2f} kB" in line


def paths(params: Any, **options: Any) -> list[str]:
    return [line.path for line in fold(go.describe(adam(**options), params))]


def test_layers_that_differ_keep_their_lines() -> None:
    shapes = {f"layers_{i}": {"kernel": (16, 32)} for i in (0, 1, 2, 4, 10)}
    assert paths(of_shapes(shapes)) == ["layers_{0..2,4,10}/kernel"]
    shapes["layers_4"] = {"kernel": (16, 64)}
    found = ["layers_{0..2,10}/kernel", "layers_4/kernel"]
    assert paths(of_shapes(shapes)) == found
    found = ["layers_{1,2,10}/kernel", "layers_0/kernel", "layers_4/kernel"]
    ranks = {"layers_0/kernel": 8}
    folded = paths(of_shapes(shapes), rank=lambda leaf: ranks.get(leaf.path, 4))
    assert sorted(folded) == sorted(found)


def test_numbers_fold_one_place_after_the_other() -> None:
    layer = {f"expert_{i}": {"kernel": (16, 32)} for i in range(4)}
    params = of_shapes({"layers": [layer, layer]})
    assert paths(params) == ["layers/{0,1}/expert_{0..3}/kernel"]


def test_a_number_inside_a_name_is_no_layer() -> None:
    params = of_shapes({"w1": (16, 32), "w2": (16, 32)})
    assert paths(params) == ["w1", "w2"]


def test_a_scale_of_a_small_leaf_is_no_warning() -> None:
    params = {"dense": {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(64)}}
    report = go.describe(go.galore_adamw8bit(1e-3, rank=8), params)
    bias = next(leaf for leaf in report if leaf.path == "dense/bias")
    assert bias.state_bytes > bias.adam_bytes
    assert "!" not in str(report)


def test_columns_are_explained() -> None:
    text = str(go.describe(adam(), {"blocks": [block(), block()]}))
    assert "\nmatrix: batch x (output x input); side: left projects the output" in text
    assert "\nstate: projector and all that the inner holds; Adam: optax.adam's" in text
    assert "equal leaves in one line" in text
    assert "f32" not in text
    assert "!" not in text
    assert "equal leaves" not in str(go.describe(adam(), block()))


def test_adam_stands_in_both_precisions_beside_16_bits() -> None:
    params = block(jnp.bfloat16)
    report = go.describe(adam(), params)
    entries = 2 * 64 * 128 + 128 + 64
    assert report.adam_bytes == 2 * 2 * entries + 4
    assert report.adam_f32_bytes == 2 * 4 * entries + 4
    header, total = str(report).splitlines()[0], str(report).splitlines()[7]
    assert header.endswith("state      Adam  Adam, f32")
    assert total.endswith("66.31 kB  132.61 kB")
    kernel = next(leaf for leaf in report if leaf.path == "up/kernel")
    assert kernel.dtype == "bfloat16"
    assert kernel.state_bytes == 2 * 64 * 4 + 2 * 4 * 128 * 4 + COUNTERS
    assert kernel.wider_bytes == 2 * 2 * 128 * 4
    norm = next(leaf for leaf in report if leaf.path == "norm/scale")
    assert (norm.state_bytes, norm.wider_bytes) == (norm.adam_bytes, 0)


def test_wide_projectors_are_no_moments() -> None:
    params = of_shapes({"kernel": (64, 128)}, jnp.bfloat16)
    (wide,) = go.describe(adam(projector_dtype=jnp.float32), params)
    (usual,) = go.describe(adam(), params)
    assert wide.state_bytes == usual.state_bytes + 2 * 64 * 4
    assert wide.wider_bytes == usual.wider_bytes


def test_wider_moments_are_said_once() -> None:
    params = {"blocks": [block(jnp.bfloat16) for _ in range(3)]}
    report = go.describe(adam(), params)
    note = only(report.notes, "f32 moments of 16-bit leaves (6 leaves)")
    assert f"take {6 * 2 * 2 * 128 * 4 / 1000:.2f} kB more" in note
    assert "moment_dtype=jnp.bfloat16" in note
    assert report.warnings == ()
    assert go.describe(adam(moment_dtype=jnp.bfloat16), params).notes == ()
    assert go.describe(adam(), {"blocks": [block()]}).notes == ()


def test_a_state_above_adamws_is_warned_of() -> None:
    params = block(jnp.bfloat16) | {"embed": of_shapes((500, 64), jnp.bfloat16)}
    report = go.describe(adam(moment_dtype=jnp.float32), params)
    warning = only(report.warnings, "the state takes")
    assert "optax.adamw's" in warning
    assert "with f32 moments" in warning
    assert "try moment_dtype=jnp.bfloat16, a lower rank" in warning
    assert f"warning: {warning}" in str(report)
    # Biases, norms and the embedding are what f32 makes of them, and said above.
    assert not any(text.startswith("at full size") for text in report.warnings)


def test_a_rank_that_reaches_a_dimension_is_warned_of() -> None:
    numbers = optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1)
    tx = adam(rank=16, weight_dimension_numbers={"w": numbers, "v": numbers})
    report = go.describe(tx, of_shapes({"w": (24, 16), "v": (64, 32)}))
    warning = only(report.warnings, "the rank reaches a dimension")
    assert "'w' (24x16) at rank 16. Lower it" in warning
    assert "'v'" not in warning
    # Its state is above Adam's, which is not said twice.
    assert len(report.warnings) == 1
    assert {leaf.path: leaf.exceeds_adam for leaf in report} == {"w": True, "v": False}


def test_projected_leaves_above_adam_are_warned_of_once() -> None:
    # P 2 * 64 * 40 bytes, moments 2 * 4 * 128 * 40, and counters, against
    # 2 * 2 * 64 * 128.
    params = {"blocks": [block(jnp.bfloat16) for _ in range(9)]}
    report = go.describe(adam(rank=40), params)
    warning = only(report.warnings, "projected, with more state than optax.adam")
    assert "(18 leaves): 'blocks/{0..8}/down/kernel' 46.09 kB against 32.77" in warning
    assert "Lower the rank" in warning
    assert "moment_dtype=jnp.bfloat16" in warning
    assert "46.09 kB!" not in str(report)  # of nine layers
    assert "414.79 kB!" in str(report)


def test_leaves_at_full_size_are_not_told_to_lower_their_rank() -> None:
    tx = go.galore(optax.amsgrad(LR), rank=4)
    report = go.describe(tx, {"blocks": [block(), block()], "embed": jnp.ones((99, 8))})
    warning = only(report.warnings, "at full size, with more state than optax.adam")
    assert "(5 leaves): 'blocks/{0,1}/norm/scale' 768 B against 512 B" in warning
    assert "rank" not in warning
    assert "take another" in warning


def test_unknown_layouts_are_warned_of_once() -> None:
    odd = {"odd": (4, 5, 6)}
    report = go.describe(adam(), of_shapes({"a": odd, "b": odd, "w": (16, 16)}))
    warning = only(report.warnings, "at full size because their axes are unknown")
    assert "(2 leaves): 'a/odd' (4x5x6), 'b/odd' (4x5x6). Name them" in warning


def test_matrices_of_no_telling_name_are_noted() -> None:
    params = block() | of_shapes({"mixture": (32, 64)})
    report = go.describe(adam(), params)
    note = only(report.notes, "projected by shape alone: 'mixture' (32x64)")
    assert f"\nnote: {note}" in str(report)
    assert go.describe(adam(), block()).notes == ()


@pytest.mark.parametrize(
    ("inner", "text"),
    [
        (optax.adam, "not used by the inner"),
        (optax.adamw, "weight decay on all of W"),
        (optax.lamb, "weight decay in coordinates only"),
    ],
)
def test_the_use_of_params_is_said(inner: Any, text: str) -> None:
    report = go.describe(go.galore(inner(0.1), rank=4), PARAMS)
    (line,) = report.params_use
    assert text in line
    assert f"\n{line}\n" in f"{report}\n"


def test_two_uses_of_params_are_told_apart() -> None:
    labels = {"embedding": "a", "layers": "a", "w": "b"}
    parts = {"a": optax.adam(0.1), "b": optax.adamw(0.1)}
    tx = optax.partition({k: go.galore(v, rank=4) for k, v in parts.items()}, labels)
    first, second = sorted(go.describe(tx, PARAMS).params_use)
    assert first.startswith("'layers/up/kernel' and its like: params: not used")
    assert second.startswith("'w' and its like: params: weight decay on all of W")


def test_swapped_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"Swap them: describe\(tx, params\)"):
        go.describe(PARAMS, adam())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"given a dict where the transformation"):
        go.describe(PARAMS, PARAMS)  # type: ignore[arg-type]
