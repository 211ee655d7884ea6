# SPDX-License-Identifier: Apache-2.0
"""`optax.inject_hyperparams`, told what cannot be a hyperparameter here."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax

from galore_optax._config import DEFAULT_SCALE

STATIC_ARGS = (
    "rank",
    "proj_type",
    "subspace",
    "weight_dimension_numbers",
    "stagger",
    "projector_dtype",
    "seed",
)
"""For `optax.inject_hyperparams(..., static_args=STATIC_ARGS)`.

These arguments of every `galore` and `galore_*` decide shapes or code and cannot be
traced. The learning rate, `scale` and `update_proj_gap` can, and are left to
`inject_hyperparams`. Those that only some have are found by
`galore_optax.inject_hyperparams`.
"""

_OF_SOME = (
    *("inner", "mask", "code", "moment_dtype", "gamma", "error_feedback"),
    *("nesterov", "ns_steps", "consistent_rms"),
)
_PER_LEAF = ("scale", "update_proj_gap")


def inject_hyperparams(
    inner_factory: Callable[..., optax.GradientTransformation],
    static_args: str | Iterable[str] = (),
    hyperparam_dtype: Any = None,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """`optax.inject_hyperparams`, which knows the static arguments of this library.

    Numbers and schedules :math:`t \\mapsto x_t` among the arguments become entries of
    `state.hyperparams`; whatever decides shapes or code (`rank`, `subspace`, `mask`,
    `code`, `moment_dtype`, ...) stays as it is.

    Args:
      inner_factory: `galore`, `galore_adamw`, ... or a function of one's own that has
        some of their arguments.
      static_args: further names. Name `scale` or `update_proj_gap` where it is a
        callable of one `Leaf`; it is taken for a schedule of the step otherwise.
      hyperparam_dtype: of floating-point hyperparameters; that of params if `None`, in
        which 16 bits make 1 of `b2=0.999`: with 16-bit params name `b1`, `b2` and `eps`
        in `static_args`.

    Returns:
      a callable that takes the arguments of `inner_factory`, or schedules in place of
      numbers, and returns a transformation whose state has `hyperparams`.

    Raises:
      ValueError: `inner_factory` has no argument of a name in `static_args`.
      TypeError: in `init`, a callable `scale` or `update_proj_gap` is no schedule.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> make = galore_optax.inject_hyperparams(galore_optax.galore_adamw)
      >>> tx = make(optax.linear_schedule(1e-2, 0.0, 100), rank=4)
      >>> state = tx.init({"kernel": jnp.ones((16, 64))})
      >>> float(state.hyperparams["scale"])
      0.25

    Source: `optax.inject_hyperparams`.
    """
    signature = inspect.signature(inner_factory)
    named = {static_args} if isinstance(static_args, str) else set(static_args)
    static = named | ({*STATIC_ARGS, *_OF_SOME} & set(signature.parameters))
    inject = optax.inject_hyperparams(inner_factory, static, hyperparam_dtype)

    @functools.wraps(inner_factory)
    def wrapped(*args: Any, **kwargs: Any) -> optax.GradientTransformationExtraArgs:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        for name in set(_PER_LEAF) & set(bound.arguments) - static:
            bound.arguments[name] = _hyperparameter(name, bound.arguments)
        return inject(*bound.args, **bound.kwargs)

    return wrapped


def _hyperparameter(name: str, arguments: dict[str, Any]) -> Any:
    """A schedule that says what it is where it fails, or a number."""
    value = arguments[name]
    # A filter has no scale: `galore` refuses one where it has no inner.
    if value is None and arguments.get("inner") is not None:
        return DEFAULT_SCALE
    return _schedule(name, value) if callable(value) else value


def _schedule(name: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(function)
    def of_step(count: jax.Array) -> Any:
        try:
            return function(count)
        except Exception as error:
            raise TypeError(
                f"{name} is a callable that was called with the step, as a schedule,"
                f" and failed ({error}). If it is a function of a galore_optax.Leaf,"
                " write galore_optax.inject_hyperparams(...,"
                f" static_args={name!r})."
            ) from error

    return of_step
