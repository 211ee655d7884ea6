# SPDX-License-Identifier: Apache-2.0
"""`galore`, with an inner optimizer or as a filter."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar, cast

import jax
import optax

from galore_optax._config import DEFAULT_SCALE, Config, Projection, make_config
from galore_optax._selection.dimensions import WeightDimensionNumbers
from galore_optax._state import GaLoreState
from galore_optax._transform import projected
from galore_optax._types import PerLeaf, ProjType, Scalar
from galore_optax._wrapping.full_size import with_full_size_rate
from galore_optax.moments import AtRefresh
from galore_optax.refresh import RefreshRule
from galore_optax.residual import Residual
from galore_optax.subspace import Subspace

_Optimizer = TypeVar("_Optimizer", bound=Callable[..., Any])


class Projecting(optax.GradientTransformationExtraArgs):
    """What projects, and so must not be projected again."""


class Filter(Projecting):
    """`galore` without an inner: the filter `G → P PᵀG`, or a mark for `chain`."""

    config: Config


def _filter(config: Config, scale: Any) -> Filter:
    if scale is not None:
        raise ValueError(
            f"scale={scale!r} has no effect on galore without an inner"
            " transformation: what follows in optax.chain would undo it. Give the"
            " inner: galore(optax.adamw(lr), rank=..., scale=...). Under"
            " optax.inject_hyperparams, which traces it, an inner is needed too."
        )
    selection = dataclasses.replace(config.selection, scale=1.0)
    unscaled = dataclasses.replace(config, selection=selection)
    init, update = projected(lambda plan: optax.identity(), unscaled)
    warn = functools.cache(_warn_about_memory)

    def warning_init(params: Any) -> GaLoreState:
        _refuse_residual(config)
        _refuse_rate(config)
        warn()
        return init(params)

    result = Filter(warning_init, update)
    result.config = config
    return result


def _refuse_residual(config: Config) -> None:
    if config.residual is not None:
        raise ValueError(
            f"residual={config.residual!r} without an inner would make G of G: it is"
            " scaled as the inner scales coordinates. Give the inner:"
            " galore(optax.scale_by_adam(), residual=...)."
        )


def _refuse_rate(config: Config) -> None:
    if config.full_size_rate is not None:
        raise ValueError(
            f"full_size_rate={config.full_size_rate!r} has no effect on galore without"
            " an inner transformation: what follows in optax.chain would undo it. Give"
            " the inner, galore(optax.adamw(lr), full_size_rate=...), or use"
            " galore_optax.chain."
        )


def _warn_about_memory() -> None:
    warnings.warn(
        "galore without an inner transformation only filters gradients (G → P PᵀG):"
        " whatever follows it in optax.chain keeps full-size state, so no memory is"
        " saved. Write galore(optax.adamw(lr), rank=...), or use galore_optax.chain"
        " instead of optax.chain.",
        UserWarning,
        stacklevel=3,
    )


def bind(config: Config, inner: Any) -> optax.GradientTransformationExtraArgs:
    """`galore` with `inner`, which is checked here."""
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"inner={inner!r} is no optax.GradientTransformation. Pass one, such as"
            " optax.adamw(1e-3): galore(optax.adamw(1e-3), rank=128)."
        )
    if isinstance(inner, Filter):
        raise TypeError(
            "the inner of galore is galore without an inner, which would project twice."
            " Pass the optimizer itself: galore(optax.adamw(1e-3), rank=128)."
        )
    if isinstance(inner, Projecting):
        raise TypeError(
            "the inner of galore projects already, as galore(...), galore_adamw and its"
            " kin do, and its coordinates would be projected again. Use it as it is, or"
            " pass the optimizer itself: galore(optax.adamw(1e-3), rank=128)."
        )
    tx = projected(lambda plan: inner, config)
    return Projecting(*with_full_size_rate(tx, config))


def galore(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: PerLeaf[int | float] = 128,
    update_proj_gap: PerLeaf[Scalar] = 200,
    scale: PerLeaf[Scalar] | None = None,
    full_size_rate: Scalar | None = None,
    proj_type: ProjType = "std",
    subspace: Subspace | None = None,
    weight_dimension_numbers: WeightDimensionNumbers = None,
    stagger: bool = False,
    projector_dtype: Any = None,
    moment_dtype: Any = None,
    moments: AtRefresh | None = None,
    refresh: RefreshRule | None = None,
    residual: Residual | None = None,
    seed: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs any optimizer on low-rank projections of the gradients.

    For a weight matrix :math:`W` with gradient :math:`G`, both (m, n), and an
    orthonormal projector :math:`P`, (m, rank), found anew from the gradient every
    `update_proj_gap` steps,

    .. math:: R = P^T G, \quad U, s = \mathrm{inner}(R, s), \quad
        W \leftarrow W + \mathrm{scale} \cdot P U,

    so that the state of `inner` has rank times n entries. Decoupled weight decay of the
    inner acts on all of :math:`W`, unscaled: :math:`W \leftarrow W - lr (\mathrm{scale}
    \cdot P\,\mathrm{adam}(R) + wd\, W)`. An inner that uses `params` in another way
    (trust ratios, parameter scales, decay inside its moments) sees the coordinates
    :math:`P^T W / \mathrm{scale}`, and what lies outside the span of :math:`P` is left
    alone. Embeddings, heads, norms, biases and convolutions go to `inner` at full size,
    unscaled but for `full_size_rate`; `describe` prints which leaf is treated how.

    `update` takes the extra argument `refresh`: `None` refreshes in the graph whatever
    is due; a static `False` compiles a step without refresh code; a static `True`
    refreshes every matrix; a traced bool is ANDed with what is due. All other extra
    arguments go to `inner`. Projectors are constants to reverse-mode differentiation
    through an update, refreshed in it or not.

    Args:
      inner: runs on the projected gradients; its updates are lifted and scaled. Without
        it the result filters gradients, :math:`G \to P P^T G`, for
        `galore_optax.chain`; in `optax.chain` that saves no memory, and warns.
      rank: of the projected gradients, at most min(m, n); or a share of min(m, n), a
        float between 0 and 1, rounded to the nearest rank from 1 on.
      update_proj_gap: steps between refreshes of a projector.
      scale: factor on lifted updates, in effect on the learning rate of the projected
        leaves; 0.25 if `None`. Each of these three may differ by leaf: a dictionary
        by regular expressions over paths, `{r"attn": 64, r".*": 128}`, whose first
        that is found decides, or a callable of one `Leaf`.
      full_size_rate: learning rate of leaves at full size, relative to that of `inner`,
        1 if `None`. With c, these step as by the same optimizer at c times its learning
        rate, decay included, without any state. `galore(optax.adamw(4e-3), scale=0.25,
        full_size_rate=0.25)` treats embeddings, heads and norms as `optax.adamw(1e-3)`.
      proj_type: which side is projected, with rows the output axes: `"std"` the shorter
        (columns of a square matrix), `"reverse_std"` the other, `"left"` the rows,
        `"right"` the columns, `"full"` both, with two projectors.
      subspace: how projectors are found; `subspace.power()` if `None`.
      weight_dimension_numbers: which leaves are projected, along which axes: `None` for
        the library's rule; `optax.contrib.MuonDimensionNumbers` (axes in neither field
        are batch axes); a tree of these like params, `None` for full size; or a
        callable of params that returns one (see `match_paths`).
      stagger: spread the refreshes of different matrices evenly over the gap.
      projector_dtype: of stored projectors; that of the parameter if `None`. With
        `jnp.int8` or `jnp.int4` they are `QuantizedProjector`, 1.05 or 0.55 bytes an
        entry, decoded one leaf at a time beside each product.
      moment_dtype: of all that `inner` holds. If `None`, projected leaves have moments
        in f32 at least, and the others what `inner` alone would give them, such as bf16
        moments of a bf16 embedding.
      moments: what becomes of the inner's moments when a matrix takes a new basis; an
        object of `galore_optax.moments`, `keep()` if `None`. Moments that move are
        constants to differentiation through a step that may refresh.
      refresh: how many gaps a matrix keeps its basis; an object of
        `galore_optax.refresh`, always one if `None`.
      residual: what the update takes from the gradient outside of the subspace; an
        object of `galore_optax.residual`, nothing if `None`. It needs whole gradients.
      seed: of the subspace methods that draw random numbers.

    Returns:
      a transformation whose state is a `GaLoreState`. Updates have the dtypes of
      params, or of the gradients where no params are given.

    Raises:
      TypeError: `inner` is no transformation; an argument has the wrong type; `rank` is
        traced.
      ValueError: an argument is out of range; axes overlap or do not exist; nothing is
        projected; a pattern matches no leaf, or none a projected one; `inner` keeps
        parameter values in its state; the state was made with
        another configuration; updates and params are different trees.

    Example:
      >>> import galore_optax, jax, jax.numpy as jnp, optax
      >>> params = {"dense": {"kernel": jnp.ones((64, 256)), "bias": jnp.zeros(256)}}
      >>> tx = galore_optax.galore(optax.adamw(1e-3), rank=8)
      >>> state = tx.init(params)
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, state = jax.jit(tx.update)(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> state.inner_state[0].mu["dense"]["kernel"].shape
      (8, 256)

    Source: Zhao et al., GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
    Projection, ICML 2024, arXiv 2403.03507, Algorithm 2 and Definition 3.6.
    """
    config = make_config(
        {
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "full_size_rate": full_size_rate,
            "proj_type": proj_type,
            "subspace": subspace,
            "weight_dimension_numbers": weight_dimension_numbers,
            "stagger": stagger,
            "projector_dtype": projector_dtype,
            "moment_dtype": moment_dtype,
            "moments": moments,
            "refresh": refresh,
            "seed": seed,
        },
        residual,
    )
    return _filter(config, scale) if inner is None else bind(config, inner)


_PARAMETERS = inspect.signature(galore).parameters
_DEFAULTS = {x: _PARAMETERS[x].default for x in Projection.__annotations__} | {
    "scale": DEFAULT_SCALE  # None without an inner alone
}


def with_projection(
    function: _Optimizer, *, without: str = "", defaults: Mapping[str, Any] = {}
) -> _Optimizer:
    """Shows the arguments of `galore` in the signature of what takes `**projection`.

    What is given is held against it, under the optimizer's own name.
    """
    own = inspect.signature(function)
    kept = [x for x in own.parameters.values() if x.kind is not x.VAR_KEYWORD]
    theirs = [
        _PARAMETERS[name].replace(default=default)
        for name, default in (_DEFAULTS | dict(defaults)).items()
        if name != without
    ]
    signature = own.replace(parameters=kept + theirs)

    @functools.wraps(function)
    def optimizer(*args: Any, **kwargs: Any) -> Any:
        _check_call(function.__name__, signature, args, kwargs)
        return function(*args, **kwargs)

    optimizer.__signature__ = signature  # type: ignore[attr-defined]
    return cast(_Optimizer, optimizer)


def _check_call(
    name: str,
    signature: inspect.Signature,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    for given in kwargs:
        if given not in signature.parameters and given not in _DEFAULTS:
            near = get_close_matches(given, signature.parameters, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{name}() has no argument {given!r}.{hint}")
    if args and isinstance(args[0], optax.GradientTransformation):
        raise TypeError(
            f"the learning rate of {name} is a transformation, {args[0]!r}. {name} is"
            " an optimizer of its own and takes a number or a schedule; around another"
            " one write galore_optax.galore(optax.adamw(1e-3), rank=128)."
        )


def with_defaults(
    defaults: Mapping[str, Any], projection: Mapping[str, Any]
) -> Projection:
    """`projection` as given, with an optimizer's own defaults for the rest."""
    given = {name: x for name, x in projection.items() if x is not None}
    return cast(Projection, {**defaults, **given})


def config_of(projection: Projection, residual: Residual | None = None) -> Config:
    """Of what was given, with the defaults of `galore` for the rest."""
    unknown = [name for name in projection if name not in _DEFAULTS]
    if unknown:
        raise TypeError(f"unexpected arguments: {', '.join(unknown)}. See `galore`.")
    return make_config(cast(Projection, _DEFAULTS | dict(projection)), residual)
