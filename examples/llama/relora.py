# SPDX-License-Identifier: Apache-2.0
"""ReLoRA: LoRA that is merged into the kernels and begun anew, every so many steps.

    W <- W + (alpha / r) · B A,  A drawn anew,  B <- 0,  moments of A and B pruned

Pruned as in the authors' recipe and their published 1B configuration: the tenth of a
moment's entries that is largest stays (their paper writes of a hundredth), everything
else becomes zero; Adam's step count goes on. After each restart the learning rate rises
from zero back to the schedule. No full-rank warm-up, as in GaLore's Table 2.

Lialin et al. 2023, "ReLoRA: High-Rank Training Through Low-Rank Updates".
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adapters

PRUNED = 0.9  # share of a moment's entries that a restart sets to zero


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
    def pruned(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return prune(leaf) if name.endswith(("/a", "/b")) else leaf

    return jax.tree_util.tree_map_with_path(pruned, opt_state)


def prune(moment: jax.Array) -> jax.Array:
    """Zeros for the smallest entries of every matrix in `moment` (..., m, n)."""
    size = jnp.abs(moment).astype(jnp.float32)
    least = jnp.quantile(size, PRUNED, axis=(-2, -1), keepdims=True)
    return jnp.where(size > least, moment, 0)
