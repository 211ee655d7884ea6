# SPDX-License-Identifier: Apache-2.0
"""The LLaMA as functions before, in and after its layers, for `galore_optax.layerwise`.

The parameters are those of `model.LLaMA`, only grouped; a tied head has its norm only:

    {embed, layers, norm, lm_head}  <->  Params(embed, layers, {norm, lm_head})
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import layerwise

from data import PAD
from model import LLaMA


def group(params: dict[str, Any]) -> layerwise.Params:
    head = {name: params[name] for name in ("norm", "lm_head") if name in params}
    return layerwise.Params(params["embed"], params["layers"], head)


def ungroup(params: layerwise.Params) -> dict[str, Any]:
    return {"embed": params.embed, "layers": params.blocks, **params.head}


def with_weights(parts: jax.Array) -> dict[str, jax.Array]:
    """Parts (A, B/A, T + 1), and what makes their mean loss that of all tokens (A,)."""
    count = len(parts)
    total = jnp.maximum(jnp.sum(parts[:, :, 1:] != PAD), 1)
    return {"tokens": parts, "weight": jnp.full(count, count / total)}


def functions(model: LLaMA) -> layerwise.Model:
    """The three parts of `model`, which may be abstract.

    Each reads a batch of `with_weights`, without its first axis.
    """
    last = {"norm": model.norm} | ({} if model.tied else {"lm_head": model.lm_head})
    structure, _ = layerwise.split(model.embed, model.layers, last)

    def head(last: Any, tied: Any, x: jax.Array, batch: Any) -> jax.Array:
        project = tied.attend if model.tied else last["lm_head"]
        logits = project(last["norm"](x))  # (B, T, V)
        return masked_loss(logits, batch["tokens"][:, 1:])[0] * batch["weight"]

    return structure.model(
        embed=lambda embed, batch: embed(inputs(batch["tokens"])),
        block=lambda block, x, batch: block(x),
        head=head,
    )


def inputs(batch: jax.Array) -> jax.Array:
    """What a model reads of (B, T + 1), padding replaced."""
    return jnp.maximum(batch[:, :-1], 0)  # (B, T)


def masked_loss(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy in nats, summed over the labels that are known; their count."""
    known = labels != PAD
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), jnp.maximum(labels, 0)
    )
    return jnp.sum(losses * known), jnp.sum(known)
