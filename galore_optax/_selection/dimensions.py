# SPDX-License-Identifier: Apache-2.0
"""`weight_dimension_numbers`: what the user says about the axes of each leaf."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp

from galore_optax._selection.layout import Axes, Verdict, recognise
from galore_optax._selection.leaves import Flat, flatten, masked_paths, named_leaves
from galore_optax._selection.patterns import Patterns, compile_rules, listing

Shape = tuple[int, ...]

VECTORS = ("norm", "bias", "vector")


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
    decides; a leaf that no pattern matches is left to the library's own rule. So is a
    leaf below a module that a pattern gives `True`: biases and norms in it stay at
    full size. A pattern that names the leaf itself, such as `embedding`, selects it.

    Args:
      rules: by regular expression, `optax.contrib.MuonDimensionNumbers` for the axes,
        `True` to project along the axes that the library's rule finds, or `None` to
        keep the leaf at full size.

    Returns:
      a callable of the params tree, for `galore(..., weight_dimension_numbers=...)`.
      It raises `ValueError` where a pattern matches no leaf of that tree.

    Raises:
      re.error: a pattern is no regular expression.
      TypeError: a value of `rules` is none of these.

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
    for pattern, spec in rules.items():
        _check_spec(f"match_paths({{{pattern!r}: ...}})", spec)
    return _ByPatterns("match_paths", compile_rules("match_paths", rules))


@dataclasses.dataclass(frozen=True)
class _ByPatterns(Patterns[Spec]):
    """A callable of the params tree: the specification of every leaf."""

    def __call__(self, params: Any) -> Any:
        flat = flatten(params)
        self.check_matches((*flat.paths, *masked_paths(params)))
        found = _recognise(flat)
        specs = [
            self._spec(path, found[path], value.ndim) for path, value in flat.items()
        ]
        return flat.treedef.unflatten(specs)

    def _spec(self, path: str, found: Verdict, ndim: int) -> Spec:
        ours = True if found.axes else None
        rule = self.first(path)
        if rule is None:
            return ours
        pattern, spec = rule
        selects = spec is not True or _names_leaf(pattern, path, ndim)
        return spec if selects else ours


def _names_leaf(pattern: re.Pattern[str], path: str, ndim: int) -> bool:
    """Whether `pattern` means this leaf and not all that is below some module.

    It does where it would not match a sibling of another name. A matrix it also means
    by a part of the leaf's own name.
    """
    module, slash, name = path.rpartition("/")
    if not pattern.search(module + slash + _SIBLING):
        return True
    by_name = pattern.search(name) and not pattern.search(_SIBLING)
    return ndim == 2 and bool(by_name)


_SIBLING = "a_leaf_of_another_name"


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
    found = _recognise(flat)
    if _is_callable(numbers):
        numbers = numbers(params)
    if numbers is None:
        return found
    if isinstance(numbers, DimensionNumbers):
        return {path: _where_it_fits(numbers, value) for path, value in flat.items()}
    given = _flatten_specs(numbers)
    _check_places(given, flat.paths, masked_paths(params))
    places = {path: _closest(given, path) for path in flat.paths}
    everywhere = all(given[place] is True for place in places.values())
    verdicts = {}
    for path, shape in _shapes(flat).items():
        place = places[path]
        if place == path and given[place] is True:
            verdicts[path] = _selected(path, shape, found[path], everywhere)
        else:
            verdicts[path] = _verdict(path, shape, given[place], found[path])
    return verdicts


def _is_callable(numbers: Any) -> bool:
    # A tree of specifications may itself be callable, as an Equinox module is.
    specs = jax.tree.leaves(numbers, is_leaf=_is_spec)
    return callable(numbers) and not (specs and all(map(_is_spec, specs)))


def _is_spec(node: Any) -> bool:
    return node is None or isinstance(node, (bool, DimensionNumbers))


def _check_spec(where: str, spec: Any) -> None:
    if not _is_spec(spec):
        number = isinstance(spec, (int, float))
        raise TypeError(
            f"{where} is {spec!r}. Use"
            " optax.contrib.MuonDimensionNumbers(reduction_axis, output_axis),"
            " True for the library's own choice of axes, or None for full size."
            f"{_RANKS if number else ''}"
        )


_RANKS = (
    " Ranks, gaps and scales by path go to galore as they are:"
    " galore(..., rank={pattern: rank, ...})."
)


def _flatten_specs(numbers: Any) -> dict[str, Spec]:
    given = dict(named_leaves(numbers, _is_spec))
    for path, spec in given.items():
        _check_spec(f"weight_dimension_numbers at '{path}'", spec)
    return given


def _check_places(
    given: dict[str, Spec], paths: tuple[str, ...], masked: list[str]
) -> None:
    known = {prefix for path in (*paths, *masked) for prefix in _prefixes(path)}
    for path in given:
        if path not in known:
            raise ValueError(
                f"weight_dimension_numbers has an entry at '{path}', where params have"
                f" no leaf. The leaves are: {listing(paths)}. Give a tree of the"
                " same structure as params, or a prefix of it."
            )


def _closest(given: dict[str, Spec], path: str) -> str:
    """Where the specification of this leaf is given: at it, or above it.

    By path and not by structure: wrappers replace leaves by `MaskedNode`, and NNX
    boxes them in `init` only.
    """
    for prefix in _prefixes(path):
        if prefix in given:
            return prefix
    raise ValueError(
        f"weight_dimension_numbers says nothing about the leaf '{path}'. Add an"
        " entry for it: None keeps it at full size."
    )


def _prefixes(path: str) -> Iterator[str]:
    """The path and those of all nodes above it, longest first."""
    while path:
        yield path
        path = path.rpartition("/")[0]
    yield ""


def _where_it_fits(numbers: DimensionNumbers, value: Any) -> Verdict:
    if unsuitable(value):
        return Verdict(None, unsuitable(value))
    try:
        return Verdict(_axes("", tuple(value.shape), numbers), "as given", named=True)
    except ValueError:
        return Verdict(None, "axes do not fit")


def _verdict(path: str, shape: Shape, spec: Spec, found: Verdict) -> Verdict:
    if spec is None or spec is False:
        return Verdict(None, "as given" if found.axes else found.reason)
    if isinstance(spec, DimensionNumbers):
        return Verdict(_axes(path, shape, spec), "as given", named=True)
    return found


def _selected(path: str, shape: Shape, found: Verdict, everywhere: bool) -> Verdict:
    """What `True` at this very leaf makes of it.

    `everywhere` it is given to all leaves alike, and cannot mean a bias or a norm.
    """
    meant = not everywhere or found.reason not in VECTORS
    if found.axes is None and len(shape) == 2 and meant:
        return Verdict(_as_matrix(path), "as given")
    if found.axes or everywhere:
        return found
    raise ValueError(
        f"weight_dimension_numbers selects '{path}' of shape {shape}, whose axes the"
        f" library's rule does not know ({found.reason}). Give None to keep it at full"
        " size, or name its axes:"
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
