# SPDX-License-Identifier: Apache-2.0
"""Moments in eight bits, for any Optax transformation.

    stored    (codes, scales) for each moment
    a step    decode -> inner.update in f32 -> encode

The step's own update is made from moments that were decoded but not yet coded again, as
in bitsandbytes.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from galore_optax import codes
from galore_optax._leaves import Placeholder
from galore_optax.codes import Code, Quantized

Sign = Literal["signed", "unsigned"]

# Fields of Optax' states that hold moments. Others may hold parameters, which eight
# bits would ruin.
MOMENTS: Mapping[str, Sign] = {
    "mu": "signed",
    "trace": "signed",
    "ema": "signed",
    "nu": "unsigned",
    "nu_max": "unsigned",
    "sum_of_squares": "unsigned",
    "e_g": "unsigned",
    "e_x": "unsigned",
}


def quantized(
    inner: optax.GradientTransformation,
    *,
    code: Code | None = None,
    moments: Mapping[str, Sign] = MOMENTS,
) -> optax.GradientTransformationExtraArgs:
    """`inner`, its moments stored in eight bits.

    Inside GaLore, `galore(quantized(optax.adam(lr)))`, around it or without it.

    Args:
      inner: any Optax transformation.
      code: by default `galore_optax.codes.companded()`.
      moments: which fields of the inner's state are coded, and whether they may be
        negative. The default knows the moments of Optax' own optimizers.

    Returns:
      the transformation; its state is the inner's with `codes.Quantized` for moments.

    Raises:
      ValueError: nothing is coded; a block divides no axis; a state was made with
        another code. The leaf is named.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> tx = galore_optax.quantized(optax.adam(1e-3))
      >>> state = tx.init({"kernel": jnp.ones((64, 128))})
      >>> state[0].mu["kernel"].codes.dtype
      dtype('int8')

    Source: Dettmers et al., arXiv 2110.02861.
    """
    code = codes.companded() if code is None else code
    if not isinstance(code, Code):
        raise TypeError(
            f"code={code!r} is no code. Pass galore_optax.codes.companded(),"
            " galore_optax.codes.dynamic() or an object with their methods."
        )
    inner = optax.with_extra_args_support(inner)
    storage = _Storage(code, moments)

    def init(params: Any) -> Any:
        state = inner.init(params)
        if isinstance(params, Placeholder):
            return storage.unlabelled(state)
        stored = storage.encode(state)
        if not any(map(_is_coded, jax.tree.leaves(stored, is_leaf=_is_coded))):
            raise ValueError(_nothing_coded(state, moments))
        return stored

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        full = storage.decode(state)
        found, new = inner.update(updates, full, params, **extra_args)
        return _as_usual(found, updates, params), storage.encode(new)

    return optax.GradientTransformationExtraArgs(init, update)


def _as_usual(found: Any, updates: Any, params: Any) -> Any:
    """In the dtypes that moments of the dtype of params would have led to."""
    others = (updates,) if params is None else (updates, params)

    def cast(x: Any, *like: Any) -> Any:
        return x.astype(jnp.result_type(*like))

    return jax.tree.map(cast, found, *others)


def _is_coded(node: Any) -> bool:
    return isinstance(node, Quantized)


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Which leaves of a state are moments, and how they are stored.

    Every moment becomes a `Quantized`, also those that stay as they are: GaLore
    compares the structures of states for large and small parameters.
    """

    code: Code
    moments: Mapping[str, Sign]

    def sign(self, path: tuple[Any, ...]) -> Sign | None:
        """That of the innermost field of a path that holds moments."""
        names = [str(getattr(key, "name", "")) for key in path]
        found = [self.moments[name] for name in names if name in self.moments]
        return found[-1] if found else None

    def encode(self, state: Any) -> Any:
        """A state of the inner, its moments stored."""

        def one(path: tuple[Any, ...], x: Any) -> Any:
            sign = self.sign(path)
            moment = sign and jnp.issubdtype(x.dtype, jnp.floating)
            return self._store(path, x, sign == "signed") if moment else x

        return jax.tree_util.tree_map_with_path(one, state)

    def unlabelled(self, state: Any) -> Any:
        """For `optax.tree.map_params`: stored moments are not shaped like params."""

        def one(path: tuple[Any, ...], x: Any) -> Any:
            return jnp.zeros([]) if self.sign(path) else x

        def is_leaf(x: Any) -> bool:
            return isinstance(x, Placeholder)

        return jax.tree_util.tree_map_with_path(one, state, is_leaf=is_leaf)

    def decode(self, state: Any) -> Any:
        """The inverse of `encode`, up to rounding."""

        def one(path: tuple[Any, ...], x: Any) -> Any:
            return self._load(path, x) if _is_coded(x) else x

        return jax.tree_util.tree_map_with_path(one, state, is_leaf=_is_coded)

    def _store(self, path: tuple[Any, ...], x: Any, signed: bool) -> Quantized:
        try:
            suits = self.code.suits(x.shape)
        except ValueError as error:
            raise ValueError(f"'{_name(path)}': {error}") from None
        if not suits:
            return Quantized(x, jnp.ones((), x.dtype))
        return self.code.encode(x.astype(jnp.float32), signed)

    def _load(self, path: tuple[Any, ...], stored: Quantized) -> jax.Array:
        signed = self.sign(path) == "signed"
        self._check(path, stored, signed)
        if jnp.issubdtype(stored.codes.dtype, jnp.floating):
            return stored.codes
        return self.code.decode(stored, signed)

    def _check(self, path: tuple[Any, ...], stored: Quantized, signed: bool) -> None:
        like = jax.ShapeDtypeStruct(stored.codes.shape, jnp.float32)
        wanted = jax.eval_shape(lambda x: self._store(path, x, signed), like)
        same = stored.scales.shape == wanted.scales.shape and (
            stored.codes.dtype == wanted.codes.dtype or wanted.scales.shape == ()
        )
        if not same:
            raise ValueError(
                f"the state of '{_name(path)}' was stored under another code:"
                f" {_sizes(stored)} where {self.code!r} makes {_sizes(wanted)}. Restore"
                " it with the code it was saved with, or begin a new state with"
                " tx.init(params)."
            )


def _sizes(stored: Any) -> str:
    parts = [f"{name} {x.dtype}{list(x.shape)}" for name, x in stored._asdict().items()]
    return ", ".join(parts)


def _nothing_coded(state: Any, moments: Mapping[str, Sign]) -> str:
    paths = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    shown = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
    return (
        "quantized found nothing to store in eight bits: no array under a field"
        f" called {', '.join(moments)}. The state has {shown or 'no leaves'}. Name its"
        " moments with moments=, or use the transformation as it is."
    )


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
