# SPDX-License-Identifier: Apache-2.0
"""Moments in eight bits, for any Optax transformation.

    stored    (codes, scales) for each moment
    a step    decode -> inner.update in f32 -> encode

The step's own update is made from moments that were decoded but not yet coded again, as
in bitsandbytes. A stored moment is never in a box (`_leaves.py`), whose metadata
describe one array: the inner sees its moments in the boxes of its updates.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax import codes
from galore_optax._context import current
from galore_optax._selection.leaves import Placeholder, in_dtype
from galore_optax._storage.moments import MomentStorage, Sign, holds_coded, name
from galore_optax.codes import Code

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
        another code, or by a transformation without one. The leaf is named.

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
            " galore_optax.codes.dynamic() or an object with the methods of"
            " galore_optax.codes.Code. A code that can be called is called by"
            " optax.inject_hyperparams: use galore_optax.inject_hyperparams."
        )
    inner = optax.with_extra_args_support(inner)
    storage = MomentStorage(code, moments)

    def init(params: Any) -> Any:
        if isinstance(params, Placeholder):
            return storage.unlabelled(inner.init(params))
        storages = current().storages
        if storages is not None:
            storages.append(storage)
        stored = storage.initial(inner.init, params)
        if not holds_coded(stored):
            raise ValueError(_nothing_coded(stored, moments))
        return stored

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        if not holds_coded(state):
            raise ValueError(_not_ours(state, code))
        full = storage.decode(state, updates)
        like = updates if params is None else params
        wide = storage.widened(updates, like)
        weights = None if params is None else storage.widened(params, like)
        found, new = inner.update(wide, full, weights, **extra_args)
        return _as_usual(found, like), storage.encode(new, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _as_usual(found: Any, like: Any) -> Any:
    """In the dtypes of the parameters, or of the updates where there are none."""

    def cast(x: Any, y: Any) -> Any:
        both = all(jnp.issubdtype(z.dtype, jnp.inexact) for z in (x, y))
        return in_dtype(x, y.dtype) if both else x

    return jax.tree.map(cast, found, like)


def _nothing_coded(state: Any, moments: Mapping[str, Sign]) -> str:
    return (
        "quantized found nothing to store in eight bits: no array under a field"
        f" called {', '.join(moments)}. The state has {_few_leaves(state)}. Name its"
        " moments with moments=, or use the transformation as it is."
    )


def _not_ours(state: Any, code: Code) -> str:
    return (
        f"quantized expects a state whose moments are stored by {code!r}, and was given"
        f" one without any: it has {_few_leaves(state)}. Another transformation made"
        " it. Restore it with that one, or begin a new state with tx.init(params)."
    )


def _few_leaves(state: Any) -> str:
    pairs = jax.tree_util.tree_leaves_with_path(state)
    shown = [f"{name(path)} {jax.typeof(x).str_short()}" for path, x in pairs[:8]]
    return ", ".join(shown + ["..."] * (len(pairs) > 8)) or "no leaves"
