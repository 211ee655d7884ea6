# SPDX-License-Identifier: Apache-2.0
"""State bytes equal those of a real init, and each array is of the right kind."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
import pytest

import galore_optax
from galore_optax import codes, memory
from galore_optax.memory import Method, Setting, Sizes

SIZES = Sizes(vocab=96, width=32, hidden=80, layers=3, heads=4, key_heads=2)
RANK = (("rank", 8),)
NAMED = [
    *(
        Method(name)
        for name in ("sgd", "adam", "adamw", "adafactor", "lion", "adagrad")
    ),
    *(Method(name) for name in ("adam8bit", "adamw8bit", "lion8bit")),
    *(
        Method(f"galore_{name}", RANK)
        for name in ("adamw", "adamw8bit", "adafactor", "lion", "sgd", "adam8bit")
    ),
    Method("adamw8bit", (("code", "dynamic"),)),
    Method("galore_adamw8bit", (*RANK, ("code", "dynamic"))),
    Method("galore_adamw", (*RANK, ("moment_dtype", "bfloat16"))),
    Method("galore_adamw", (*RANK, ("proj_type", "full"))),
    Method("adamw", (("mu_dtype", "float32"),)),
    Method("adamw", (("moment_dtype", "float32"),)),
]
TRANSFORMATIONS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "scheduled": lambda: optax.adamw(optax.constant_schedule(0.1)),
    "noisy": lambda: optax.chain(optax.add_noise(0.1, 0.9, 0), optax.adam(0.1)),
    "chain": lambda: galore_optax.chain(galore_optax.galore(rank=4), optax.adamw(0.1)),
    "quantized": lambda: galore_optax.quantized(
        optax.adam(0.1), code=codes.dynamic(min_size=64)
    ),
}


def real_bytes(tx: optax.GradientTransformation, dtype: str) -> int:
    params = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), memory.shapes(SIZES, dtype)
    )
    arrays = jax.tree.leaves(tx.init(params))
    return sum(x.nbytes for x in arrays)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", NAMED, ids=str)
def test_state_is_that_of_a_real_init(method: Method, dtype: str) -> None:
    plan = memory.plan(SIZES, method, Setting(dtype=dtype))
    assert plan.state.total == real_bytes(method.make(), dtype)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_any_transformation_does(name: str) -> None:
    tx = TRANSFORMATIONS[name]()
    assert memory.plan(SIZES, tx).state.total == real_bytes(tx, "bfloat16")


def test_kinds_of_galore_in_eight_bits() -> None:
    params = {"up": {"kernel": jnp.zeros((64, 128), jnp.bfloat16)}}
    tx = galore_optax.galore_adamw8bit(0.1, rank=32)
    found = memory.state_bytes(tx.init(params))
    assert found.projectors == 2 * 64 * 32
    assert found.first_moments == found.second_moments == 32 * 128
    assert found.scales == 2 * (2 * 32 * 128 // 64)  # bf16, blocks of 64
    assert 0 < found.other < 64  # counters, the key


def test_moments_have_their_dtypes() -> None:
    params = {"up": {"kernel": jnp.zeros((64, 128), jnp.bfloat16)}}
    params["norm"] = {"scale": jnp.zeros(64, jnp.bfloat16)}
    found = memory.state_bytes(galore_optax.galore_adamw(0.1, rank=8).init(params))
    moments = {"f32": 4 * 8 * 128, "bf16": 2 * 64}
    assert found.dtypes == {"first_moments": moments, "second_moments": moments}
    assert sum(moments.values()) == found.first_moments


def test_kinds_of_adafactor() -> None:
    params = {"kernel": jnp.zeros((256, 512))}
    found = memory.state_bytes(optax.adafactor(0.1).init(params))
    assert found.second_moments == 4 * (256 + 512 + 1)  # rows, columns, no full v
    assert found.first_moments == 0


def test_a_parameter_called_like_a_moment_is_none() -> None:
    state = optax.trace(0.9).init({"nu": jnp.zeros(4), "scales": jnp.zeros(4)})
    assert memory.state_bytes(state) == memory.StateBytes(first_moments=32)


def test_keys_count_as_their_data() -> None:
    assert memory.tree_bytes(jax.random.key(0)) == 8


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GB", 24 * 10**9),
        ("24 gb", 24 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("7", 7),
        (".5kB", 500),
        ("2TiB", 2**41),
    ],
)
def test_sizes_are_read(text: str, expected: int) -> None:
    assert memory.parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "24G B", "-1GB", "0GB", "1e3", "24 XB"])
def test_sizes_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="24GB"):
        memory.parse_size(text)
