# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name, and their steps, compiled and timed."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax

ADAMW, OURS, THEIRS = "optax.adamw", "galore_optax", "optax.contrib.galore"
GALORE, EIGHT_BIT, WIDE = "galore_adamw", "galore_adamw8bit", "optax.adamw, f32 moments"
RATE = 1e-3
NEVER = 10**6  # a gap longer than any run


def optimizer(name: str, rank: int, gap: int = NEVER) -> optax.GradientTransformation:
    """By one of the names above; `OURS` is around Adam, as contrib's is."""
    low = {"rank": rank, "update_proj_gap": gap}
    make: dict[str, Callable[[], optax.GradientTransformation]] = {
        ADAMW: lambda: optax.adamw(RATE),
        WIDE: lambda: with_f32_moments(optax.adamw(RATE)),
        OURS: lambda: galore_optax.galore(optax.adam(RATE), **low),
        "galore_optax, stagger=True": lambda: galore_optax.galore(
            optax.adam(RATE), **low, stagger=True
        ),
        GALORE: lambda: galore_optax.galore_adamw(RATE, **low),
        EIGHT_BIT: lambda: galore_optax.galore_adamw8bit(RATE, **low),
        THEIRS: lambda: optax.contrib.galore(RATE, **low),
    }
    return make[name]()


def with_f32_moments(
    tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """`tx` on parameters and gradients in f32; its updates in their dtypes again."""

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        wide = None if params is None else cast(params)
        found, state = tx.update(cast(updates), state, wide)
        return jax.tree.map(lambda x, y: x.astype(y.dtype), found, updates), state

    return optax.GradientTransformation(lambda params: tx.init(cast(params)), update)


def galore_state(opt_state: Any) -> galore_optax.GaLoreState:
    """The one of GaLore inside any optimizer's state."""

    def is_state(node: Any) -> bool:
        return isinstance(node, galore_optax.GaLoreState)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_state)
    return next(node for node in nodes if is_state(node))


def timed(f: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds until all of a result is there; what it is made of is waited for."""
    jax.block_until_ready(arguments)
    start = time.perf_counter()
    found = jax.block_until_ready(f(*arguments))
    return time.perf_counter() - start, found


def repeated(f: Callable[..., Any], *arguments: Any, repeats: int) -> list[float]:
    """Seconds of as many calls, after one that compiles."""
    jax.block_until_ready(f(*arguments))
    return [timed(f, *arguments)[0] for _ in range(repeats)]


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
        return timed(self.step, gradients)[0]

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
        return jax.jit(applied(tx), donate_argnums=(0, 1)).lower(params, state, params)

    def step(self, gradients: Any) -> Any:
        self.params, self.state = self.compiled(self.params, self.state, gradients)
        return self.params

    def start(self, gradients: Any) -> None:
        """One step that is not timed, with our first refresh and without contrib's."""
        state = optax.tree.set(self.state, count=jnp.int32(1))
        self.state = jax.tree.map(jnp.copy, state)  # no buffer is donated twice
        self.seconds(gradients)


def applied(tx: optax.GradientTransformation, **extra: Any) -> Callable[..., Any]:
    """An update and `apply_updates`; `extra` are arguments of the update."""
    update = optax.with_extra_args_support(tx).update

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = update(gradients, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step
