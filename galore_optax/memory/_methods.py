# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name, with their options by name.

    "adamw"             optax.adamw, or whatever else optax exports under a name
    "adam8bit"          galore_optax.quantized(optax.adam(...))
    "galore_adamw"      galore_optax.galore(optax.adamw(...)), options for both
    "galore_adam8bit"   galore_optax.galore(galore_optax.quantized(optax.adam(...)))

A plain one takes `moment_dtype` too: "adamw" with `moment_dtype=float32` keeps f32
moments of 16-bit weights, as no option of Optax does for the second moment.
Those that are ready-made go by their names.
"""

import ast
import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import jax
import optax

from galore_optax import codes, moments, refresh, residual, subspace
from galore_optax._galore import galore
from galore_optax._optimizers.adafactor import galore_adafactor
from galore_optax._optimizers.adamw import galore_adamw, galore_adamw8bit
from galore_optax._optimizers.apollo import apollo_adamw, apollo_mini_adamw
from galore_optax._optimizers.fira import fira_adamw
from galore_optax._optimizers.ldadam import ldadam
from galore_optax._optimizers.muon import galore_muon
from galore_optax._storage.quantized import quantized

# Needs more than gradients, deprecated, parts of optimizers.
_LEFT_OUT = re.compile("lbfgs$|optimistic_adam$|scale_by_|_")
_READY: dict[str, Callable[..., optax.GradientTransformation]] = {
    "galore_adamw": galore_adamw,
    "galore_adamw8bit": galore_adamw8bit,
    "galore_adafactor": galore_adafactor,
    "galore_muon": galore_muon,
    "fira_adamw": fira_adamw,
    "apollo_adamw": apollo_adamw,
    "apollo_mini_adamw": apollo_mini_adamw,
    "ldadam": ldadam,
}
_PREFIX, _SUFFIX = "galore_", "8bit"
_MOMENTS = "moment_dtype"
_BY_NAME: dict[str, ModuleType] = {
    "subspace": subspace,
    "code": codes,
    "moments": moments,
    "refresh": refresh,
    "residual": residual,
}


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


# Everything in optax whose first argument is a learning rate.
_PLAIN: dict[str, Callable[..., optax.GradientTransformation]] = {
    name: value
    for name, value in sorted(vars(optax).items())
    if (inspect.isfunction(value) or isinstance(value, functools.partial))
    and not _LEFT_OUT.match(name)
    and _parameters(value)[:1] == ["learning_rate"]
}


@dataclasses.dataclass(frozen=True)
class Method:
    """An optimizer by name, with its options."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def is_galore(self) -> bool:
        return self.name.startswith(_PREFIX) or self.name in _READY

    @property
    def is_8bit(self) -> bool:
        return self.name.endswith(_SUFFIX)

    @property
    def family(self) -> str:
        """The name, however moments are stored."""
        return self.name.removesuffix(_SUFFIX)

    @property
    def rank(self) -> Any:
        """As given, or the method's own; of one that projects."""
        make = _READY.get(self.name, galore)
        default = inspect.signature(make).parameters["rank"].default
        return dict(self.options).get("rank", default)

    def with_options(self, **options: Any) -> "Method":
        return Method(self.name, tuple((dict(self.options) | options).items()))

    def in_8bit(self) -> "Method":
        return Method(self.name + _SUFFIX, self.options)

    def make(
        self, learning_rate: optax.ScalarOrSchedule = 1e-3
    ) -> optax.GradientTransformation:
        """The transformation.

        Raises:
          ValueError: an unknown name or option; the nearest known ones are offered.
        """
        known = option_names(self.name)
        for option, _ in self.options:
            _check("option", option, known, f" of {self.name!r}")
        values = {key: _value(key, value) for key, value in self.options}
        if self.name in _READY:
            return _READY[self.name](learning_rate, **values)
        outer = {k: values.pop(k) for k in _outer(self.name) if k in values}
        tx = _PLAIN[_inner(self.name)](learning_rate, **values)
        if self.is_8bit:
            tx = quantized(tx, code=outer.pop("code", None))
        if self.is_galore:
            return galore(tx, **outer)
        return _in_dtype(tx, outer[_MOMENTS]) if _MOMENTS in outer else tx

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in self.options)
        return f"{self.name}({options})" if options else self.name


def method_names() -> list[str]:
    """Every name that `Method` takes.

    Example:
      >>> from galore_optax import memory
      >>> {"adamw", "adam8bit", "galore_lion"} <= set(memory.method_names())
      True
    """
    plain = [name + suffix for name in _PLAIN for suffix in ("", _SUFFIX)]
    return sorted({*plain, *(_PREFIX + name for name in plain), *_READY})


def parse_options(items: Iterable[str]) -> dict[str, Any]:
    """Options from `name=value` texts; values are Python literals or names.

    Raises:
      ValueError: a text without an equals sign.

    Example:
      >>> from galore_optax import memory
      >>> memory.parse_options(["rank=1024", "subspace=svd"])
      {'rank': 1024, 'subspace': 'svd'}
    """
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not (name and equals):
            raise ValueError(f"option {item!r} is not of the form name=value.")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def option_names(name: str) -> list[str]:
    """The options of the method `name`.

    Raises:
      ValueError: an unknown name; the nearest known ones are offered.
    """
    plain = ", ".join(_PLAIN)
    shown = f"{plain}, each also with {_PREFIX} before and {_SUFFIX} after it"
    _check("method", name, method_names(), shown=shown)
    if name in _READY:
        return _parameters(_READY[name])[1:]
    return [*_outer(name), *_parameters(_PLAIN[_inner(name)])[1:]]


def _outer(name: str) -> list[str]:
    """Those that the optimizer of Optax does not know."""
    coded = ["code"] if name.endswith(_SUFFIX) else []
    if name.startswith(_PREFIX):
        return _parameters(galore)[1:] + coded
    return coded or [_MOMENTS]


def _inner(name: str) -> str:
    return name.removeprefix(_PREFIX).removesuffix(_SUFFIX)


def _in_dtype(
    tx: optax.GradientTransformation, dtype: Any
) -> optax.GradientTransformation:
    """`tx` computed in `dtype`, its updates rounded to the dtype of the weights.

    This is what `galore(..., moment_dtype=dtype)` makes of a leaf at full size.
    """

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    def init(params: Any) -> Any:
        return tx.init(cast(params))

    def update(updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        wide = optax.with_extra_args_support(tx).update
        updates, state = wide(cast(updates), state, cast(params), **extra)
        rounded = jax.tree.map(lambda x, like: x.astype(like.dtype), updates, params)
        return rounded, state

    return optax.GradientTransformationExtraArgs(init, update)


def _value(option: str, value: Any) -> Any:
    """A subspace method or a code where it is given by its name."""
    if option not in _BY_NAME or not isinstance(value, str):
        return value
    module = _BY_NAME[option]
    names = [x for x in vars(module) if x.islower() and not x.startswith("_")]
    _check(option, value, names)
    return getattr(module, value)()


def _check(
    kind: str, name: str, known: Sequence[str], of: str = "", shown: str = ""
) -> None:
    """Raises where `name` is unknown; the nearest are offered."""
    if name in known:
        return
    near = get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    shown = shown or ", ".join(known)
    raise ValueError(f"unknown {kind} {name!r}{of}.{hint} Known: {shown}.")
