# SPDX-License-Identifier: Apache-2.0
"""The parameters of a LLaMA, without numbers."""

from typing import Any

import jax
import jax.numpy as jnp

from galore_optax.layerwise import Params
from galore_optax.memory._sizes import Sizes


def shapes(sizes: Sizes, dtype: Any = jnp.bfloat16) -> Params:
    """The parameters of a LLaMA as `jax.ShapeDtypeStruct`s.

    Args:
      sizes: of the model.
      dtype: of all weights.

    Returns:
      `Params` of nested dictionaries; kernels are (in, out), those of blocks (L, in,
      out).

    Example:
      >>> from galore_optax import memory
      >>> memory.shapes(memory.Sizes.load("9m")).blocks["mlp"]["up"]["kernel"].shape
      (4, 128, 352)
    """
    d, f, q, k = sizes.width, sizes.hidden, sizes.query_width, sizes.key_width

    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    def stacked(**kernels: tuple[int, int]) -> Any:
        return {name: {"kernel": of(sizes.layers, *x)} for name, x in kernels.items()}

    blocks = {
        "attn_norm": {"scale": of(sizes.layers, d)},
        "attn": stacked(q=(d, q), k=(d, k), v=(d, k), o=(q, d)),
        "mlp_norm": {"scale": of(sizes.layers, d)},
        "mlp": stacked(gate=(d, f), up=(d, f), down=(f, d)),
    }
    head = {"norm": {"scale": of(d)}, "kernel": of(d, sizes.vocab)}
    return Params({"embedding": of(sizes.vocab, d)}, blocks, head)
