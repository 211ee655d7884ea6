# SPDX-License-Identifier: Apache-2.0
"""A small model of equal layers, as three functions, and its plain training step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax
from galore_optax import layerwise
from tests.helpers import normal

WIDTH, HIDDEN, LAYERS, VOCAB, STEPS, RATE = 16, 24, 3, 50, 20, 1e-2

EPS = float(np.finfo(np.float32).eps)
# A step of at most RATE, from gradients of a hundred terms.
TOLERANCE = RATE * 100 * EPS


def parameters(layers: int = LAYERS) -> layerwise.Params:
    def small(number: int, *shape: int) -> jax.Array:
        return 0.3 * normal(number, shape)

    blocks = {
        "up": {"kernel": small(1, layers, WIDTH, HIDDEN)},
        "down": {"kernel": small(2, layers, HIDDEN, WIDTH)},
        "norm": {"scale": jnp.ones((layers, WIDTH))},
    }
    head = {"lm_head": {"kernel": small(3, WIDTH, VOCAB)}}
    return layerwise.Params({"embedding": small(0, VOCAB, WIDTH)}, blocks, head)


def embed(params: Any, batch: jax.Array) -> jax.Array:
    return params["embedding"][batch[:, :-1]]


def block(params: Any, x: jax.Array, batch: jax.Array) -> jax.Array:
    size = jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    hidden = (x / size * params["norm"]["scale"]) @ params["up"]["kernel"]
    return x + jax.nn.silu(hidden) @ params["down"]["kernel"]


def head(params: Any, embed: Any, x: jax.Array, batch: jax.Array) -> jax.Array:
    logits = x @ params["lm_head"]["kernel"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:])
    return jnp.mean(losses)


def tied_head(params: Any, embed: Any, x: jax.Array, batch: jax.Array) -> jax.Array:
    kernel = embed["embedding"].T + params["lm_head"]["kernel"]
    return head({"lm_head": {"kernel": kernel}}, embed, x, batch)


MODEL = layerwise.Model(embed, block, head)
TIED = layerwise.Model(embed, block, tied_head)


def batches(step: int, count: int) -> jax.Array:
    rng = np.random.default_rng(step)
    return jnp.asarray(rng.integers(0, VOCAB, (count, 4, 9)), jnp.int32)


def loss_of(model: layerwise.Model, params: Any, batch: jax.Array) -> jax.Array:
    def body(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        return model.block(layer, x, batch), None

    x, _ = jax.lax.scan(body, model.embed(params.embed, batch), params.blocks)
    return model.head(params.head, params.embed, x, batch)


def plain_step(model: layerwise.Model, tx: Any) -> Any:
    """Accumulates in coordinates, the bases coming from the first micro-batch."""

    def step(params: Any, state: Any, batches: jax.Array) -> tuple[Any, Any, Any]:
        total: Any = None
        for number, batch in enumerate(batches):
            gradient = jax.grad(lambda p, b=batch: loss_of(model, p, b))(params)
            low, state = galore_optax.project_gradients(
                tx, gradient, state, params, refresh=None if number == 0 else False
            )
            low = jax.tree.map(lambda x: x / len(batches), low)
            total = low if total is None else jax.tree.map(jnp.add, total, low)
        updates, state = galore_optax.update_projected(tx, total, state, params)
        return optax.apply_updates(params, updates), state, total

    return jax.jit(step)


def assert_close(found: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path)
        ),
        found,
        expected,
    )


def field(state: Any, name: str) -> Any:
    """Of GaLore's state, or of the Adam inside it."""
    return getattr(state if hasattr(state, name) else state.inner_state[0], name)


def stacked(state: layerwise.Params, name: str) -> layerwise.Params:
    """The same, put together from the states of the parts."""
    parts = zip(("embed", "blocks", "head"), state, strict=True)
    return layerwise.Params(*(getattr(field(x, name), part) for part, x in parts))


# Two programs differ in last bits of gradients, and bf16 may round these apart.
EXACT = galore_optax.subspace.power(product_dtype=jnp.float32)


def galore(**options: Any) -> Any:
    schedule = optax.linear_schedule(RATE, RATE / 2, STEPS)
    return galore_optax.galore_adamw(
        schedule,
        rank=4,
        update_proj_gap=8,
        weight_decay=0.1,
        subspace=EXACT,
        **options,
    )
