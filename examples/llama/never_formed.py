# SPDX-License-Identifier: Apache-2.0
"""The functions of a run whose matrices' gradients are never formed.

R = (x P)ᵀ dy   in place of   G = xᵀ dy,  R = PᵀG
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import galore_optax

from steps import Program, State


@dataclasses.dataclass(frozen=True)
class NeverFormedProgram(Program):
    """`Program` for a projected optimizer, given coordinates alone."""

    clip: float = 0.0  # largest norm of the coordinates and the other gradients; 0: any

    def coordinates(self, state: State, parts: jax.Array) -> tuple[jax.Array, Any, Any]:
        """Mean loss over all predicted tokens of (A, B/A, T + 1), its coordinates.

        Third the optimizer state, with the bases that the first part decided.
        """
        loss = self.mean_loss(parts)
        make = functools.partial(galore_optax.value_and_projected_grad, loss, self.tx)
        if len(parts) == 1:
            return make()(state.params, state.opt_state, parts[0])

        def add(carry: Any, part: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
            sums, opt_state = carry
            tokens, first = part
            *found, opt_state = make(refresh=first)(state.params, opt_state, tokens)
            sums = jax.tree.map(lambda s, x: s + x.astype(s.dtype), sums, tuple(found))
            return (sums, opt_state), None

        one = jax.eval_shape(make(refresh=False), *state[1:], parts[0])[:2]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), one)
        first = jnp.arange(len(parts)) == 0
        carry = zeros, state.opt_state
        (sums, opt_state), _ = jax.lax.scan(add, carry, (parts, first))
        return *jax.tree.map(lambda s, x: s.astype(x.dtype), sums, one), opt_state

    def advance(self, state: State, parts: jax.Array) -> tuple[Any, ...]:
        """As `Program`'s; the norm is that of the coordinates."""
        loss, low, opt_state = self.coordinates(state, parts)
        norm = optax.tree.norm(low)
        if self.clip:
            clip = optax.clip_by_global_norm(self.clip)
            low, _ = clip.update(low, optax.EmptyState())
        update = functools.partial(galore_optax.update_projected, self.tx)
        updates, opt_state = update(low, opt_state, state.params)
        return optax.apply_updates(state.params, updates), opt_state, loss, norm
