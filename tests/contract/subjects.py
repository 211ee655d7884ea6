# SPDX-License-Identifier: Apache-2.0
"""Every transformation of ours, each a row of the table that these files hold.

Adding a transformation is one line in `TRANSFORMATIONS`.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import galore_optax as go
from tests.helpers import normal_like

LR = 0.05

Make = Callable[[], optax.GradientTransformationExtraArgs]


def _chained() -> optax.GradientTransformation:
    return go.chain(optax.clip_by_global_norm(1.0), go.galore(rank=4), optax.adamw(LR))


READY_MADE: dict[str, Make] = {
    "galore_adamw": lambda: go.galore_adamw(LR, rank=4, update_proj_gap=2),
    "galore_adamw8bit": lambda: go.galore_adamw8bit(
        LR, rank=4, code=go.codes.companded(min_size=64), update_proj_gap=3
    ),
    "galore_adafactor": lambda: go.galore_adafactor(LR, rank=4, b1=0.9),
    "fira_adamw": lambda: go.fira_adamw(
        LR, rank=4, weight_decay=0.1, update_proj_gap=3
    ),
    "apollo_adamw": lambda: go.apollo_adamw(
        LR, rank=4, weight_decay=0.1, update_proj_gap=3
    ),
    "apollo_mini_adamw": lambda: go.apollo_mini_adamw(
        LR, weight_decay=0.1, update_proj_gap=3
    ),
    "galore_muon": lambda: go.galore_muon(
        LR, rank=4, weight_decay=0.1, update_proj_gap=2
    ),
    "ldadam": lambda: go.ldadam(LR, rank=4, weight_decay=0.1),
}

TRANSFORMATIONS: dict[str, Make] = READY_MADE | {
    "galore(adam)": lambda: go.galore(optax.adam(LR), rank=4, update_proj_gap=3),
    "galore(sgd)": lambda: go.galore(optax.sgd(LR, momentum=0.9), rank=4),
    "galore(lion)": lambda: go.galore(optax.lion(LR, weight_decay=0.01), rank=4),
    "galore(lamb)": lambda: go.galore(optax.lamb(LR), rank=4),
    "galore(adam), svd": lambda: go.galore(
        optax.adam(LR), rank=4, subspace=go.subspace.svd()
    ),
    "galore(adam), eigh": lambda: go.galore(
        optax.adam(LR), rank=4, subspace=go.subspace.eigh(), proj_type="reverse_std"
    ),
    "galore(adam), randomized": lambda: go.galore(
        optax.adam(LR), rank=4, subspace=go.subspace.randomized()
    ),
    "galore(adam), random": lambda: go.galore(
        optax.adam(LR), rank=4, subspace=go.subspace.random(), stagger=True
    ),
    "galore(adam), gaussian": lambda: go.galore(
        optax.adam(LR), rank=4, subspace=go.subspace.gaussian(), update_proj_gap=2
    ),
    "galore(adam), golore": lambda: go.galore(
        optax.adam(LR),
        rank=4,
        subspace=go.subspace.golore(random_from=2),
        moments=go.moments.transfer(),
        update_proj_gap=2,
    ),
    "galore(adam), sara": lambda: go.galore(
        optax.adam(LR), rank=4, subspace=go.subspace.sara(), update_proj_gap=2
    ),
    "galore(adam), raw residual": lambda: optax.chain(
        go.galore(optax.scale_by_adam(), rank=4, residual=go.residual.raw()),
        optax.scale_by_learning_rate(LR),
    ),
    "galore(adam), dct": lambda: go.galore(
        optax.adam(LR),
        rank=4,
        subspace=go.subspace.dct(),
        moments=go.moments.rotate(),
        update_proj_gap=2,
    ),
    "galore(adam), lazy": lambda: go.galore(
        optax.adam(LR), rank=4, refresh=go.refresh.lazy(), update_proj_gap=1
    ),
    "galore(muon)": lambda: go.galore(optax.contrib.muon(LR), rank=4),
    "galore(adam), full": lambda: go.galore(optax.adam(LR), rank=4, proj_type="full"),
    "galore(adam), int4": lambda: go.galore(
        optax.adam(LR), rank=4, projector_dtype="int4", update_proj_gap=3
    ),
    "galore_adamw, rotate": lambda: go.galore_adamw(
        LR, rank=4, moments=go.moments.rotate(), update_proj_gap=2
    ),
    "galore_adamw8bit, rotate": lambda: go.galore_adamw8bit(
        LR,
        rank=4,
        code=go.codes.companded(min_size=64),
        moments=go.moments.rotate(),
        update_proj_gap=2,
    ),
    "galore_adamw, full_size_rate": lambda: go.galore_adamw(
        LR, rank=4, full_size_rate=0.3, update_proj_gap=2
    ),
    "galore_adamw, full, reset": lambda: go.galore_adamw(
        LR, rank=4, moments=go.moments.reset(), proj_type="full", update_proj_gap=2
    ),
    "galore(adam), svd, signs aligned": lambda: go.galore(
        optax.adam(LR),
        rank=4,
        subspace=go.subspace.svd(),
        moments=go.moments.keep(align_signs=True),
    ),
    "galore_adamw8bit, dynamic": lambda: go.galore_adamw8bit(
        LR, rank=4, code=go.codes.dynamic(block=32, min_size=64)
    ),
    "chain": _chained,
    "quantized(adam)": lambda: go.quantized(
        optax.adam(LR), code=go.codes.companded(min_size=64)
    ),
}


# A row takes its time: others are run by CI alone, where they differ from these in
# nothing that the table is about.
QUICK = {"galore_adamw", "galore_adamw8bit", "galore_adafactor", "fira_adamw"}


def _rows(names: dict[str, Make], quick: Collection[str]) -> pytest.MarkDecorator:
    rows = [
        pytest.param(make, id=name, marks=[pytest.mark.slow] * (name not in quick))
        for name, make in names.items()
    ]
    return pytest.mark.parametrize("make", rows)


every = _rows(TRANSFORMATIONS, QUICK)
# Whose state is a `GaLoreState`, and no tuple of Optax' chain.
INSIDE = (
    "quantized(adam)",
    "chain",
    "galore(adam), raw residual",
    "fira_adamw",
    "apollo_adamw",
    "apollo_mini_adamw",
    "ldadam",
)
outermost = _rows({k: v for k, v in TRANSFORMATIONS.items() if k not in INSIDE}, QUICK)
ready_made = _rows(READY_MADE, QUICK)


def params(dtype: Any = jnp.float32) -> Any:
    shapes = {
        "embedding": (20, 8),
        "layers": {
            "up": {"kernel": (2, 8, 24), "bias": (2, 24)},
            "norm": {"scale": (2, 8)},
        },
        "w": (16, 8),
    }
    zeros = jax.tree.map(
        lambda shape: jnp.zeros(shape, dtype),
        shapes,
        is_leaf=lambda x: type(x) is tuple,
    )
    return normal_like(zeros, seed=0)


@dataclasses.dataclass(frozen=True)
class Started:
    """A transformation at its first state, and its update compiled once for all."""

    tx: optax.GradientTransformationExtraArgs
    weights: Any
    state: Any
    update: Any


@functools.cache
def started(make: Make, dtype: Any = jnp.float32) -> Started:
    tx, weights = make(), params(dtype)
    return Started(tx, weights, tx.init(weights), jax.jit(tx.update))


def avals(tree: Any) -> Any:
    return jax.tree.map(
        lambda x: (x.shape, x.dtype, x.weak_type), jax.eval_shape(lambda: tree)
    )


def assert_equal(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a: Any, b: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    compare = functools.partial(np.testing.assert_allclose, rtol=rtol, atol=atol)
    jax.tree.map(compare, a, b)
