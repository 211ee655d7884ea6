# SPDX-License-Identifier: Apache-2.0
"""LoRA: a frozen linear map plus a trained product of two thin matrices.

    y = W x + (alpha / r) · B A x            A (r, in) and B (out, r), B = 0 at first

Kernels are kept as (in, out), so that in code y = x W + (alpha / r) · (x A) B. `adapt`
puts such maps in place of linear ones inside any NNX model, stacked layers included.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx

# torch's default for a linear map, uniform within ±1/√in, as Hu et al. start A.
_A_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LoRALinear(nnx.Module):
    """A linear map whose own parameters get no gradient (Hu et al. 2021, eq. 3)."""

    def __init__(self, base: nnx.Linear, rank: int, alpha: float, rngs: nnx.Rngs):
        *batch, d_in, d_out = base.kernel.shape
        dtype = base.kernel.dtype
        keys = jax.random.split(rngs.params(), batch)
        draw = jnp.vectorize(lambda key: _A_INIT(key, (d_in, rank), dtype))
        self.base = base
        self.scale = alpha / rank
        self.a = nnx.Param(draw(keys))  # (..., in, r)
        self.b = nnx.Param(jnp.zeros((*batch, rank, d_out), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        graphdef, state = nnx.split(self.base)
        y = nnx.merge(graphdef, jax.lax.stop_gradient(state))(x)
        a, b = (leaf[...].astype(y.dtype) for leaf in (self.a, self.b))
        return y + self.scale * (x.astype(y.dtype) @ a) @ b


def adapt(
    model: nnx.Module,
    rank: int,
    alpha: float,
    match: Callable[[tuple[str, ...]], bool],
    rngs: nnx.Rngs,
) -> None:
    """Puts a `LoRALinear` in place of every linear map whose path matches."""
    found = [
        (path, module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear) and match(tuple(map(str, path)))
    ]
    if not found:
        raise ValueError("adapt: no linear map of the model has a path that matches.")
    for path, module in found:
        parent = _at(model, path[:-1])
        setattr(parent, str(path[-1]), LoRALinear(module, rank, alpha, rngs))


def _at(module: nnx.Module, path: Iterable[object]) -> nnx.Module:
    for name in path:
        module = getattr(module, str(name))
    return module


def is_frozen(path: tuple[str, ...]) -> bool:
    """Whether a leaf of the parameters belongs to the frozen part of a `LoRALinear`."""
    return "base" in path
