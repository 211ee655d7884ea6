# SPDX-License-Identifier: Apache-2.0
"""Low-rank linear maps: LoRA beside a frozen kernel, or two factors in its place.

    LoRA       y = W x + (alpha / r) · B A x      A (r, in), B (out, r), B = 0 at first
    factors    y = B A x                          no W at all

Kernels are kept as (in, out), so that in code y = x W + (alpha / r) · (x A) B. `adapt`
and `factorize` put such maps in place of linear ones inside any NNX model, stacked
layers included. LoRA's dropout is left out: a pre-training run sees each token once.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Match = Callable[[tuple[str, ...]], bool]

# torch's default for a linear map, uniform within ±1/√in, as Hu et al. start A.
_A_INIT = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def draw_a(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A fresh A (..., in, r), each matrix from a key of its own."""
    *batch, d_in, rank = shape
    draw = jnp.vectorize(lambda one: _A_INIT(one, (d_in, rank), dtype))
    return draw(jax.random.split(key, tuple(batch)))


class LoRALinear(nnx.Module):
    """A linear map whose own parameters get no gradient (Hu et al. 2021, eq. 3)."""

    def __init__(self, base: nnx.Linear, rank: int, alpha: float, rngs: nnx.Rngs):
        *batch, d_in, d_out = base.kernel.shape
        dtype = base.kernel.dtype
        self.base = base
        self.scale = alpha / rank
        self.a = nnx.Param(draw_a(rngs.params(), (*batch, d_in, rank), dtype))
        self.b = nnx.Param(jnp.zeros((*batch, rank, d_out), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        graphdef, state = nnx.split(self.base)
        y = nnx.merge(graphdef, jax.lax.stop_gradient(state))(x)
        return y + self.scale * _thin(x, self.a[...], self.b[...], y.dtype)


class FactoredLinear(nnx.Module):
    """A linear map that is a product of two thin matrices, both trained.

    They start as the best approximation W ≈ U_r S_r V_rᵀ of the kernel that an ordinary
    layer would start with, A = U_r √S_r and B = √S_r V_rᵀ ("spectral" initialisation:
    Khodak et al. 2021; Kamalakara et al. 2022).
    """

    def __init__(self, base: nnx.Linear, rank: int):
        if base.bias is not None:
            raise ValueError("FactoredLinear: a linear map with a bias is not handled.")
        kernel = base.kernel[...]
        a, b = best_factors(kernel, rank)
        self.dtype = base.dtype or kernel.dtype
        self.a = nnx.Param(a)
        self.b = nnx.Param(b)

    def __call__(self, x: jax.Array) -> jax.Array:
        return _thin(x, self.a[...], self.b[...], self.dtype)


def best_factors(kernel: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """A (..., in, r) and B (..., r, out), whose product is nearest to the kernel."""
    u, s, vt = jnp.linalg.svd(kernel.astype(jnp.float32), full_matrices=False)
    root = jnp.sqrt(s[..., :rank])
    a, b = u[..., :rank] * root[..., None, :], root[..., None] * vt[..., :rank, :]
    return a.astype(kernel.dtype), b.astype(kernel.dtype)


def _thin(x: jax.Array, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1]).astype(dtype)  # see model.Linear
    y = (flat @ a.astype(dtype)) @ b.astype(dtype)
    return y.reshape(*x.shape[:-1], -1)


def adapt(
    model: nnx.Module, rank: int, alpha: float, match: Match, rngs: nnx.Rngs
) -> None:
    """Puts a `LoRALinear` in place of every linear map whose path matches."""
    _replace(model, match, lambda base: LoRALinear(base, rank, alpha, rngs))


def factorize(model: nnx.Module, rank: int, match: Match) -> None:
    """Puts a `FactoredLinear` in place of every linear map whose path matches."""
    _replace(model, match, lambda base: FactoredLinear(base, rank))


def _replace(
    model: nnx.Module, match: Match, make: Callable[[nnx.Linear], nnx.Module]
) -> None:
    found = [
        (path, module)
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear) and match(tuple(map(str, path)))
    ]
    if not found:
        raise ValueError("adapt: no linear map of the model has a path that matches.")
    for path, module in found:
        setattr(_at(model, path[:-1]), str(path[-1]), make(module))


def _at(module: nnx.Module, path: Iterable[object]) -> nnx.Module:
    for name in path:
        module = getattr(module, str(name))
    return module


def is_frozen(path: tuple[str, ...]) -> bool:
    """Whether a leaf of the parameters belongs to the frozen part of a `LoRALinear`."""
    return "base" in path


def trained(params: Any) -> Any:
    """Which leaves are trained, as a tree of bools, for `optax.masked`."""

    def is_trained(path: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return not is_frozen(tuple(name.split("/")))

    return jax.tree_util.tree_map_with_path(is_trained, params)


def trained_count(params: Any) -> int:
    """How many parameters are trained."""
    sizes = jax.tree.map(lambda x, yes: x.size * yes, params, trained(params))
    return sum(jax.tree.leaves(sizes))


def map_maps(function: Callable[[dict[str, Any]], Any], params: Any) -> Any:
    """Parameters with `function` of the dict {base, a, b} or {a, b} of every map."""
    if not isinstance(params, dict):
        return params
    if {"a", "b"} <= params.keys():
        return function(params)
    return {name: map_maps(function, part) for name, part in params.items()}


def merged_kernel(part: dict[str, Any], alpha: float) -> jax.Array:
    """W + (alpha / r) · A B, or A B where there is no W, in the dtype of the kernel."""
    a, b = (jnp.asarray(part[name], jnp.float32) for name in ("a", "b"))
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    if "base" not in part:
        return product.astype(part["a"].dtype)
    kernel = jnp.asarray(part["base"]["kernel"])
    return (kernel + alpha / a.shape[-1] * product).astype(kernel.dtype)


def merged(params: Any, alpha: float) -> Any:
    """Parameters of the plain model that computes the same; a plain model's as is."""

    def plain(part: dict[str, Any]) -> dict[str, Any]:
        return part.get("base", {}) | {"kernel": merged_kernel(part, alpha)}

    return map_maps(plain, params)
