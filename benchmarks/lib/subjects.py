# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of speed run: LLaMA shapes, gradients, and compiled steps."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax
from galore_optax.memory import Sizes

VOCAB = 32_000
TURN = 0.6435  # radians that a gradient turns between refreshes: 0.8 old + 0.6 new


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Those of a LLaMA, one leaf a matrix; with no vocabulary, of its blocks alone."""

    width: int
    hidden: int
    layers: int
    vocab: int = VOCAB

    @classmethod
    def load(cls, name: str) -> "Shapes":
        sizes = Sizes.load(name.lower())
        return cls(sizes.width, sizes.hidden, sizes.layers, sizes.vocab)

    def tree(self) -> Any:
        width, vocab = self.width, self.vocab
        blocks = {f"layers_{i}": self._layer() for i in range(self.layers)}
        if not vocab:
            return blocks
        return {
            "embed": {"embedding": (vocab, width)},
            "lm_head": {"kernel": (width, vocab)},
            "norm": {"scale": (width,)},
            **blocks,
        }

    def _layer(self) -> Any:
        width, hidden = self.width, self.hidden
        attention = {name: {"kernel": (width, width)} for name in "qkvo"}
        mlp = {name: {"kernel": (width, hidden)} for name in ("gate", "up")}
        mlp["down"] = {"kernel": (hidden, width)}
        norms = {f"{name}_norm": {"scale": (width,)} for name in ("attn", "mlp")}
        return {"attn": attention, "mlp": mlp, **norms}

    def matrices(self) -> dict[tuple[int, int], int]:
        """How many are projected, by shorter and longer side."""
        sides = {(self.width, self.width): 4, (self.width, self.hidden): 3}
        return {side: count * self.layers for side, count in sides.items()}

    def others(self) -> int:
        """Parameters that are not projected."""
        norms = 2 * self.layers + bool(self.vocab)
        return (2 * self.vocab + norms) * self.width


def random_tree(tree: Any, seed: int, make: Callable[..., jax.Array]) -> Any:
    leaves, treedef = jax.tree.flatten(tree, is_leaf=lambda x: type(x) is tuple)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [make(key, shape) for key, shape in zip(keys, leaves, strict=True)]
    return treedef.unflatten(made)


def weights(shapes: Shapes) -> Any:
    return random_tree(shapes.tree(), 0, lambda k, s: 0.02 * jax.random.normal(k, s))


@functools.partial(jax.jit, static_argnums=1)
def gradient(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Singular values near i^-0.7, flatter than those of real gradients."""
    if len(shape) == 1 or VOCAB in shape:
        return 1e-3 * jax.random.normal(key, shape)
    one, two = jax.random.split(key)
    short = min(shape)
    left = jax.random.normal(one, (shape[0], short)) * jnp.arange(1, short + 1) ** -0.7
    return 1e-3 * left @ jax.random.normal(two, (short, shape[1])) / short


def gradients(shapes: Shapes, seed: int = 1) -> Any:
    return random_tree(shapes.tree(), seed, gradient)


@jax.jit
def turned(old: Any, new: Any, angle: float | jax.Array = TURN) -> Any:
    """`old` on its way to `new`, at no loss of size between independent ones."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jax.tree.map(lambda a, b: cos * a + sin * b, old, new)


def optimizers(rank: int, gap: int) -> dict[str, optax.GradientTransformation]:
    low = {"rank": rank, "update_proj_gap": gap}
    return {
        "optax.adamw": optax.adamw(1e-3),
        "galore_optax": galore_optax.galore(optax.adam(1e-3), **low),
        "galore_optax, adamw": galore_optax.galore_adamw(1e-3, **low),
        "optax.contrib.galore": optax.contrib.galore(1e-3, **low),
    }


class Subject:
    """The update of one transformation, compiled, with its state and its times."""

    def __init__(self, tx: optax.GradientTransformation, params: Any):
        start = time.perf_counter()
        state = jax.eval_shape(tx.init, params)
        self.compiled = self.lower(tx, params, state).compile()
        self.compile_seconds = time.perf_counter() - start
        self.params, self.state = params, tx.init(params)
        self.state_bytes = sum(x.nbytes for x in jax.tree.leaves(self.state))
        self.refreshes: list[float] = []
        self.steady: list[float] = []

    def lower(self, tx: optax.GradientTransformation, params: Any, state: Any) -> Any:
        # JAX hands donated buffers to outputs of their shape in order: were the updates
        # first, they would take the moments' buffers, and the moments be copied.
        def update(gradients: Any, state: Any, params: Any) -> Any:
            return tx.update(gradients, state, params)[::-1]

        return jax.jit(update, donate_argnums=1).lower(params, state, params)

    def step(self, gradients: Any) -> Any:
        self.state, updates = self.compiled(gradients, self.state, self.params)
        return updates

    def seconds(self, gradients: Any) -> float:
        """One step, timed; what makes the gradients is waited for first."""
        jax.block_until_ready(gradients)
        start = time.perf_counter()
        jax.block_until_ready(self.step(gradients))
        return time.perf_counter() - start

    def result(self) -> dict[str, float]:
        steady = statistics.median(self.steady)
        return {
            "compile_seconds": self.compile_seconds,
            "steady_seconds": steady,
            "first_refresh_seconds": self.refreshes[0] - steady,
            "refresh_seconds": statistics.median(self.refreshes[1:]) - steady,
            "state_bytes": self.state_bytes,
        }


class InPlace(Subject):
    """Update and `apply_updates` as one program, its own weights donated too."""

    def __init__(self, tx: optax.GradientTransformation, params: Any):
        super().__init__(tx, jax.tree.map(jnp.copy, params))

    def lower(self, tx: optax.GradientTransformation, params: Any, state: Any) -> Any:
        def step(params: Any, state: Any, gradients: Any) -> Any:
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)

    def step(self, gradients: Any) -> Any:
        self.params, self.state = self.compiled(self.params, self.state, gradients)
        return self.params

    def skip_first_refresh(self) -> None:
        """Steady steps from here on, with the projectors that `init` made."""
        state = optax.tree.set(self.state, count=jnp.int32(1))
        if isinstance(state, galore_optax.GaLoreState):
            found = state.refresh._replace(last=jnp.zeros_like(state.refresh.last))
            state = state._replace(refresh=found)
        self.state = jax.tree.map(jnp.copy, state)  # no buffer is donated twice
