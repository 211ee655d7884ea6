# SPDX-License-Identifier: Apache-2.0
"""Step, refresh and compile time beside `optax.adamw` and `optax.contrib.galore`.

LLaMA-60M and 130M shapes, f32, one leaf a matrix, rank a quarter of the width. The
three run in turns within one process, so that noise of the machine meets all alike.
Gradients have decaying spectra, and turn between refreshes.

    python benchmarks/optimizer_step.py [--sizes 60M 130M]
"""

import argparse
import functools
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import common
import galore_optax

SIZES = {"60M": (512, 1376, 8), "130M": (768, 2048, 12)}  # width, hidden, layers
VOCAB = 32_000
GAP = 5
ROUNDS = 4  # refreshes; the first is cold


def shapes(width: int, hidden: int, layers: int) -> Any:
    def layer() -> Any:
        attention = {name: {"kernel": (width, width)} for name in "qkvo"}
        mlp = {name: {"kernel": (width, hidden)} for name in ("gate", "up")}
        mlp["down"] = {"kernel": (hidden, width)}
        norms = {f"{name}_norm": {"scale": (width,)} for name in ("attn", "mlp")}
        return {"attn": attention, "mlp": mlp, **norms}

    return {
        "embed": {"embedding": (VOCAB, width)},
        "lm_head": {"kernel": (width, VOCAB)},
        "norm": {"scale": (width,)},
        **{f"layers_{i}": layer() for i in range(layers)},
    }


def random_tree(tree: Any, seed: int, make: Callable[..., jax.Array]) -> Any:
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: type(x) is tuple)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [make(key, shape) for key, shape in zip(keys, leaves, strict=True)]
    return treedef.unflatten(made)


@functools.partial(jax.jit, static_argnums=1)
def gradient(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Singular values near i^-0.7, flatter than those of real gradients."""
    if len(shape) == 1 or VOCAB in shape:
        return 1e-3 * jax.random.normal(key, shape)
    one, two = jax.random.split(key)
    short = min(shape)
    left = jax.random.normal(one, (shape[0], short)) * jnp.arange(1, short + 1) ** -0.7
    return 1e-3 * left @ jax.random.normal(two, (short, shape[1])) / short


class Subject:
    """One transformation, compiled, with its state and its times."""

    def __init__(self, tx: optax.GradientTransformation, params: Any):
        start = time.perf_counter()
        state = jax.eval_shape(tx.init, params)
        self.step = jax.jit(tx.update, donate_argnums=1).lower(params, state, params)
        self.step = self.step.compile()
        self.compile_seconds = time.perf_counter() - start
        self.state = tx.init(params)
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
        self.refreshes: list[float] = []
        self.steady: list[float] = []

    def run(self, gradients: Any, params: Any, into: list[float]) -> None:
        start = time.perf_counter()
        updates, self.state = self.step(gradients, self.state, params)
        jax.block_until_ready(updates)
        into.append(time.perf_counter() - start)

    def result(self) -> dict[str, float]:
        steady = statistics.median(self.steady)
        return {
            "compile_seconds": self.compile_seconds,
            "steady_seconds": steady,
            "first_refresh_seconds": self.refreshes[0] - steady,
            "refresh_seconds": statistics.median(self.refreshes[1:]) - steady,
            "state_bytes": self.state_bytes,
        }


def formula_bytes(width: int, hidden: int, layers: int) -> int:
    """4 (m r + 2 n r) for each matrix, 8 bytes for each other parameter, counters."""
    rank = width // 4
    square = width * rank + 2 * width * rank
    oblong = width * rank + 2 * hidden * rank
    others = 2 * VOCAB * width + (2 * layers + 1) * width
    matrices = 7 * layers
    counters = 4 + 8 + 4 + 8 * matrices
    return 4 * layers * (4 * square + 3 * oblong) + 8 * others + counters


def measure(width: int, hidden: int, layers: int) -> dict[str, Any]:
    tree = shapes(width, hidden, layers)
    params = random_tree(tree, 0, lambda k, s: 0.02 * jax.random.normal(k, s))
    old = random_tree(tree, 1, gradient)
    rank = width // 4
    makers = {
        "optax.adamw": lambda: optax.adamw(1e-3),
        "galore_optax": lambda: galore_optax.galore(
            optax.adam(1e-3), rank=rank, update_proj_gap=GAP
        ),
        "galore_optax, adamw": lambda: galore_optax.galore_adamw(
            1e-3, rank=rank, update_proj_gap=GAP
        ),
        "optax.contrib.galore": lambda: optax.contrib.galore(
            1e-3, rank=rank, update_proj_gap=GAP
        ),
    }
    Subject(optax.sgd(1e-3), params)  # start XLA before anyone is timed
    subjects = {name: Subject(make(), params) for name, make in makers.items()}
    for number in range(ROUNDS):
        new = random_tree(tree, 2 + number, gradient)
        turned = jax.tree.map(lambda a, b: 0.8 * a + 0.6 * b, old, new)
        jax.block_until_ready(turned)
        for step in range(GAP):
            for subject in subjects.values():
                into = subject.refreshes if step == 0 else subject.steady
                subject.run(turned, params, into)
        old = turned
    return {name: subject.result() for name, subject in subjects.items()}


def show(size: str, results: dict[str, Any]) -> None:
    theirs = results["optax.contrib.galore"]
    print(f"\nLLaMA-{size}: seconds, and contrib's over ours")
    columns = ("compile_seconds", "steady_seconds", "refresh_seconds")
    print(
        f"{'':22}{'compile':>16}{'steady step':>16}{'refresh':>18}{'state bytes':>16}"
    )
    for name, row in results.items():
        cells = [f"{row[c]:8.3f} ({theirs[c] / row[c]:5.2f}x)" for c in columns]
        print(f"{name:22}{'  '.join(cells)}{row['state_bytes']:>16,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    found = {}
    for size in arguments.sizes:
        results = measure(*SIZES[size])
        show(size, results)
        expected = formula_bytes(*SIZES[size])
        print(f"state by the formula: {expected:,} bytes")
        found[size] = {"formula_bytes": expected, **results}
    common.write("optimizer_step", found)


if __name__ == "__main__":
    main()
