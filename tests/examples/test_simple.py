# SPDX-License-Identifier: Apache-2.0
"""The library is what its forty lines in NumPy are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simple

import galore_optax
from tests.helpers import Tilted, tilted


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_equals_the_library(shape: tuple[int, int]) -> None:
    """Two refreshes; the shorter side is projected, as a transpose of the matrix."""
    wide = shape[0] <= shape[1]
    options = {"rank": 4, "scale": 0.25}
    tx = galore_optax.galore_adamw(
        1e-2, weight_decay=0.1, update_proj_gap=3, subspace=Tilted(), **options
    )
    ours = simple.Galore(lr=1e-2, gap=3, wd=0.1, basis=tilted, **options)
    rng = np.random.default_rng(0)
    weight = rng.normal(size=shape).astype(np.float32)
    params = {"w": jnp.asarray(weight)}
    state, update = tx.init(params), jax.jit(tx.update)
    plain = np.float64(weight if wide else weight.T)
    for _ in range(5):
        gradient = rng.normal(size=shape).astype(np.float32)
        updates, state = update({"w": jnp.asarray(gradient)}, state, params)
        params = {"w": params["w"] + updates["w"]}
        plain = ours.step(plain, np.float64(gradient if wide else gradient.T))
    # Five steps of a few f32 roundings of the weight, near 3, and of updates below it.
    found = np.asarray(params["w"]) if wide else np.asarray(params["w"]).T
    np.testing.assert_allclose(found, plain, atol=5 * 4 * 2**-24 * 4)


def test_runs(capsys: pytest.CaptureFixture[str]) -> None:
    simple.main()
    errors = [float(x.split()[-1]) for x in capsys.readouterr().out.splitlines()]
    assert errors[-1] < errors[0] / 20
