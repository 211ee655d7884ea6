# SPDX-License-Identifier: Apache-2.0
"""ReLoRA: LoRA that is merged into the kernels and begun anew, every so many steps.

    W <- W + (alpha / r) · B A,  A drawn anew,  B <- 0,  moments of A and B pruned

As in the authors' recipe and their published 1B configuration the tenth of a first
moment's entries that is largest stays (their paper writes of a hundredth), the rest
becomes zero; Adam's step count goes on. After each restart the learning rate rises from
zero back to the schedule. No full-rank warm-up, as in GaLore's Table 2.

Here a second moment keeps the entries that the first one keeps. The authors' code lets
it keep its own largest: where those differ a first moment stays beside a second one of
zero, and as A has no gradient while B is zero, the next steps divide it by eps alone.

Lialin et al. 2023, "ReLoRA: High-Rank Training Through Low-Rank Updates".
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adapters

PRUNED = 0.9  # share of a moment's entries that a restart sets to zero


def check(optimizer: str, warmup: int, reset: int, steps: int) -> None:
    """Refuses what a restart cannot do."""
    if optimizer not in ("adam", "adamw"):
        raise ValueError(
            f"adapter=relora with optimizer={optimizer}: a restart prunes the moments"
            " of Adam. Take adam or adamw."
        )
    if not 1 <= warmup < reset < steps:
        raise ValueError(
            f"adapter_warmup={warmup}, adapter_reset={reset}, steps={steps} must grow"
            " in this order."
        )


def jagged(schedule: optax.Schedule, reset: int, warmup: int) -> optax.Schedule:
    """`schedule`, but linearly up from zero in the `warmup` steps after each reset."""

    def rate(count: Any) -> jax.Array:
        share = jnp.minimum(1.0, (count % reset) / warmup)
        return schedule(count) * jnp.where(count < reset, 1.0, share)

    return rate


def restart(
    params: Any, opt_state: Any, alpha: float, key: jax.Array
) -> tuple[Any, Any]:
    """Parameters and optimizer state of the next cycle, which compute the same."""
    numbers = itertools.count()

    def renew(part: dict[str, Any]) -> dict[str, Any]:
        mine = jax.random.fold_in(key, next(numbers))
        return {
            "base": part["base"] | {"kernel": adapters.merged_kernel(part, alpha)},
            "a": adapters.draw_a(mine, part["a"].shape, part["a"].dtype),
            "b": jnp.zeros_like(part["b"]),
        }

    return adapters.map_maps(renew, params), _prune_moments(opt_state)


def _prune_moments(opt_state: Any) -> Any:
    def pruned(part: Any) -> Any:
        return prune(part) if _is_adam(part) else part

    return jax.tree.map(pruned, opt_state, is_leaf=_is_adam)


def _is_adam(part: Any) -> bool:
    return isinstance(part, optax.ScaleByAdamState)


def prune(adam: optax.ScaleByAdamState) -> optax.ScaleByAdamState:
    """Zeros for the moments of A and B where the first is not among its largest."""
    kept = jax.tree_util.tree_map_with_path(_kept, adam.mu)

    def keep(moments: Any) -> Any:
        return jax.tree.map(lambda yes, x: jnp.where(yes, x, 0), kept, moments)

    return adam._replace(mu=keep(adam.mu), nu=keep(adam.nu))


def _kept(path: Any, moment: jax.Array) -> jax.Array:
    """Which entries stay: the largest of every matrix of an adapter, all of others."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if not name.endswith(("/a", "/b")):
        return jnp.ones_like(moment, bool)
    size = jnp.abs(moment).astype(jnp.float32)  # (..., m, n)
    return size > jnp.quantile(size, PRUNED, axis=(-2, -1), keepdims=True)
