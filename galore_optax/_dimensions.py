# SPDX-License-Identifier: Apache-2.0
"""`weight_dimension_numbers`: what the user says about the axes of each leaf."""

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp

from galore_optax._layout import Axes, Verdict, recognise
from galore_optax._leaves import Flat, flatten, masked_paths, path_string

Shape = tuple[int, ...]


@runtime_checkable
class DimensionNumbers(Protocol):
    """Input and output axes of a leaf, as in `optax.contrib.MuonDimensionNumbers`."""

    @property
    def reduction_axis(self) -> int | tuple[int, ...]: ...

    @property
    def output_axis(self) -> int | tuple[int, ...]: ...


# A specification for one leaf: axes; True, our rule's choice; None or False, full size.
Spec: TypeAlias = DimensionNumbers | bool | None
WeightDimensionNumbers: TypeAlias = Any  # Spec | tree of Spec | callable of params


def match_paths(rules: Mapping[str, Spec]) -> Callable[[Any], Any]:
    r"""Builds `weight_dimension_numbers` from patterns over the paths of leaves.

    The first pattern found anywhere in a leaf's path (`layers/0/attn/q/kernel`)
    decides; a leaf that no pattern matches is left to the library's own rule.

    Args:
      rules: by regular expression, `optax.contrib.MuonDimensionNumbers` for the axes,
        `True` to project along the axes that the library's rule finds, or `None` to
        keep the leaf at full size.

    Returns:
      a callable of the params tree, for `galore(..., weight_dimension_numbers=...)`.

    Raises:
      re.error: a pattern is no regular expression.

    Example:
      Attention and MLP matrices only, as the reference selects them:

      >>> import galore_optax, jax.numpy as jnp, optax
      >>> only = galore_optax.match_paths({r"attn|mlp": True, r".*": None})
      >>> tx = galore_optax.galore(
      ...     optax.adam(1e-3), rank=4, weight_dimension_numbers=only)
      >>> params = {"attn": jnp.ones((16, 16)), "other": jnp.ones((16, 16))}
      >>> print([row.path for row in galore_optax.describe(tx, params) if row.rank])
      ['attn']

    Source: `torchrun_main.py` of the reference implementation selects by name.
    """
    compiled = [(re.compile(pattern), spec) for pattern, spec in rules.items()]

    def weight_dimension_numbers(params: Any) -> Any:
        flat = flatten(params)
        found = _recognise(flat)
        specs = [
            _first_match(compiled, path, True if found[path].axes else None)
            for path in flat.paths
        ]
        return flat.treedef.unflatten(specs)

    return weight_dimension_numbers


def _first_match(
    rules: list[tuple[re.Pattern[str], Spec]], path: str, default: Spec
) -> Spec:
    return next((spec for pattern, spec in rules if pattern.search(path)), default)


def _recognise(flat: Flat) -> dict[str, Verdict]:
    found = recognise(_shapes(flat))
    for path, value in zip(flat.paths, flat.values, strict=True):
        if found[path].axes and unsuitable(value):
            found[path] = Verdict(None, unsuitable(value))
    return found


def unsuitable(value: Any) -> str:
    """Why no projection of this leaf can exist; empty where one can."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return f"dtype {value.dtype}"
    return "no entries" if 0 in value.shape else ""


def _shapes(flat: Flat) -> dict[str, Shape]:
    return {p: tuple(v.shape) for p, v in zip(flat.paths, flat.values, strict=True)}


def resolve(numbers: WeightDimensionNumbers, params: Any) -> dict[str, Verdict]:
    """The verdict on every leaf of `params`, checked against its shape."""
    flat = flatten(params)
    shapes = _shapes(flat)
    found = _recognise(flat)
    if _is_callable(numbers):
        numbers = numbers(params)
    if numbers is None:
        return found
    if isinstance(numbers, DimensionNumbers):
        return {
            path: _where_it_fits(numbers, value)
            for path, value in zip(flat.paths, flat.values, strict=True)
        }
    specs = _by_path(numbers, flat, masked_paths(params))
    return {
        path: _verdict(path, shapes[path], spec, found[path])
        for path, spec in specs.items()
    }


def _is_callable(numbers: Any) -> bool:
    return callable(numbers) and not isinstance(numbers, DimensionNumbers)


def _is_spec(node: Any) -> bool:
    return node is None or isinstance(node, (bool, DimensionNumbers))


def _by_path(numbers: Any, flat: Flat, masked: list[str]) -> dict[str, Spec]:
    """Matches a tree of specs, or a prefix of one, to leaves by path.

    By path and not by structure: wrappers replace leaves by `MaskedNode`, and NNX
    boxes them in `init` only.
    """
    given = _flatten_specs(numbers)
    for path in given:
        if not any(_covers(path, other) for other in (*flat.paths, *masked)):
            raise ValueError(
                f"weight_dimension_numbers has an entry at '{path}', where params have"
                f" no leaf. The leaves are: {_listing(flat.paths)}. Give a tree of the"
                " same structure as params, or a prefix of it."
            )
    return {path: _closest(given, path) for path in flat.paths}


def _flatten_specs(numbers: Any) -> dict[str, Spec]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(numbers, is_leaf=_is_spec)
    for path, spec in pairs:
        if not _is_spec(spec):
            raise TypeError(
                f"weight_dimension_numbers at '{path_string(path)}' is {spec!r}. Use"
                " optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis),"
                " True for the library's own choice of axes, or None for full size."
            )
    return {path_string(path): spec for path, spec in pairs}


def _covers(prefix: str, path: str) -> bool:
    return prefix in ("", path) or path.startswith(prefix + "/")


def _closest(given: dict[str, Spec], path: str) -> Spec:
    prefixes = [prefix for prefix in given if _covers(prefix, path)]
    if not prefixes:
        raise ValueError(
            f"weight_dimension_numbers says nothing about the leaf '{path}'. Add an"
            " entry for it: None keeps it at full size."
        )
    return given[max(prefixes, key=len)]


def _listing(paths: tuple[str, ...], most: int = 8) -> str:
    more = f", and {len(paths) - most} more" if len(paths) > most else ""
    return ", ".join(repr(path) for path in paths[:most]) + more


def _where_it_fits(numbers: DimensionNumbers, value: Any) -> Verdict:
    if unsuitable(value):
        return Verdict(None, unsuitable(value))
    try:
        return Verdict(_axes("", tuple(value.shape), numbers), "as given")
    except ValueError:
        return Verdict(None, "axes do not fit")


def _verdict(path: str, shape: Shape, spec: Spec, found: Verdict) -> Verdict:
    if spec is None or spec is False:
        return Verdict(None, "as given" if found.axes else found.reason)
    if isinstance(spec, DimensionNumbers):
        return Verdict(_axes(path, shape, spec), "as given")
    if found.axes is not None:
        return found
    if len(shape) == 2:
        return Verdict(_as_matrix(path), "as given")
    raise ValueError(
        f"weight_dimension_numbers selects '{path}' of shape {shape}, whose axes the"
        f" library's rule does not know ({found.reason}). Name them:"
        " optax.contrib.MuonDimensionNumbers(reduction_axis=..., output_axis=...)."
    )


def _as_matrix(path: str) -> Axes:
    return Axes((1,), (0,)) if path.endswith("kernel") else Axes((0,), (1,))


def _axes(path: str, shape: Shape, spec: DimensionNumbers) -> Axes:
    cols = _normalise(path, shape, "reduction_axis", spec.reduction_axis)
    rows = _normalise(path, shape, "output_axis", spec.output_axis)
    both = rows + cols
    if len(set(both)) != len(both):
        raise ValueError(
            f"the axes of '{path}', shape {shape}, overlap: reduction_axis="
            f"{spec.reduction_axis}, output_axis={spec.output_axis}. Name each axis"
            " once; axes named in neither are batch axes."
        )
    return Axes(rows, cols)


def _normalise(
    path: str, shape: Shape, name: str, axes: int | tuple[int, ...]
) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if not axes:
        raise ValueError(
            f"{name} of '{path}' is empty: a matrix needs at least one axis on each"
            f" side. Name axes of its shape {shape}, or give None for full size."
        )
    ndim = len(shape)
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"{name}={axes} of '{path}' is out of range for shape {shape}. Use axes"
                f" from {-ndim} to {ndim - 1}."
            )
    return tuple(axis % ndim for axis in axes)
