# SPDX-License-Identifier: Apache-2.0
"""The example's LLaMA, whose matrices' gradients are never formed."""

import jax
import numpy as np
import optax
import pytest

import galore_optax
from tests.backward.helpers import assert_close, both, state_of

from model import Config, Numerics
from steps import Program

CONFIG = Config(vocab=50, width=32, hidden=48, layers=2, heads=2, max_tokens=16)
GROUPED = Config(50, 32, 48, 2, heads=4, max_tokens=16, key_heads=2, tied=True)
BATCH = np.random.default_rng(0).integers(1, 50, (2, 9))

# In f32 some hundred terms are added up in two orders. Of bf16's eight bits each way
# rounds other things, the gradient or the factors of its coordinates: half a unit of
# 2⁻⁸ each, of three of them and of what comes down from the layers above.
F32, BF16 = 1e-5, 4 * 2**-8


@pytest.mark.parametrize(
    ("config", "compute", "remat", "tolerance"),
    [
        (CONFIG, "float32", True, F32),
        (CONFIG, "bfloat16", False, BF16),
        (GROUPED, "float32", False, F32),
    ],
)
def test_no_gradient_of_llama_is_formed(
    config: Config, compute: str, remat: bool, tolerance: float
) -> None:
    numerics = Numerics(compute=compute, remat=remat)
    tx = galore_optax.galore(optax.sgd(1.0), rank=4)
    program = Program(config, numerics, tx, 1, None)
    weights = program.init_params(0)
    pair = both(lambda p, batch: program.loss(p, batch)[0], tx, False)
    found, expected = jax.jit(pair)(weights, state_of(tx, weights), BATCH)
    assert_close(found, expected, tolerance)
    explained = galore_optax.explain(program.loss, tx, weights, BATCH)
    assert len(explained.leaves) == 7
    assert not any(leaf.formed for leaf in explained)
    assert explained.flops_in_coordinates < explained.flops / 2
