# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name, with their options by name.

    "adamw"             optax.adamw
    "galore_adamw"      galore_optax.galore_adamw
    "galore_<any>"      galore_optax.galore(<any>), options for both

Any optimizer that `optax` exports is known by its name there.
"""

import functools
import inspect
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import jax
import optax

import galore_optax

# Needs more than gradients, deprecated, parts of optimizers.
_LEFT_OUT = re.compile("lbfgs$|optimistic_adam$|scale_by_|_")


def _plain() -> dict[str, Callable[..., optax.GradientTransformation]]:
    """Everything in optax whose first argument is a learning rate."""
    found = {}
    for name, value in sorted(vars(optax).items()):
        if inspect.isfunction(value) or isinstance(value, functools.partial):
            first = next(iter(inspect.signature(value).parameters), None)
            if first == "learning_rate" and not _LEFT_OUT.match(name):
                found[name] = value
    return found


PLAIN = _plain()
READY = {
    "galore_adamw": galore_optax.galore_adamw,
    "galore_adamw8bit": galore_optax.galore_adamw8bit,
    "galore_adafactor": galore_optax.galore_adafactor,
}
_PREFIX = "galore_"
_GALORE = list(inspect.signature(galore_optax.galore).parameters)[1:]


def names() -> list[str]:
    wrapped = [_PREFIX + name for name in PLAIN]
    return sorted({*PLAIN, *READY, *wrapped})


def make(
    name: str, learning_rate: optax.ScalarOrSchedule, options: dict[str, Any]
) -> optax.GradientTransformation:
    """The optimizer called `name`.

    Args:
      name: one of `names()`.
      learning_rate: number or schedule.
      options: keyword arguments; subspace methods and codes are given by their names.

    Raises:
      ValueError: an unknown name or option; the nearest known ones are offered.
    """
    known = options_of(name)
    for option in options:
        if option not in known:
            raise ValueError(_unknown("option", option, known, f" of {name!r}"))
    for option in {"subspace", "code"} & set(options):
        options = options | {option: _method(option, options[option])}
    if name in READY:
        return READY[name](learning_rate, **options)
    if name in PLAIN:
        return PLAIN[name](learning_rate, **options)
    outer = {key: value for key, value in options.items() if key in _GALORE}
    inner = {key: value for key, value in options.items() if key not in _GALORE}
    plain = PLAIN[name.removeprefix(_PREFIX)](learning_rate, **inner)
    return galore_optax.galore(plain, **outer)


def options_of(name: str) -> list[str]:
    """The options that an optimizer takes."""
    if name not in names():
        near = _near(name, names())
        raise ValueError(
            f"unknown optimizer {name!r}.{near} Known: {', '.join(PLAIN)}, and each of"
            f" these with {_PREFIX} before it."
        )
    if name in READY or name in PLAIN:
        return _parameters((READY | PLAIN)[name])
    return _GALORE + _parameters(PLAIN[name.removeprefix(_PREFIX)])


def _parameters(function: Callable[..., Any]) -> list[str]:
    return [p for p in inspect.signature(function).parameters if p != "learning_rate"]


def _method(option: str, name: Any) -> Any:
    """A subspace method or a code, by its name."""
    if not isinstance(name, str):
        return name
    module = {"subspace": galore_optax.subspace, "code": galore_optax.codes}[option]
    methods = [x for x in vars(module) if x.islower() and not x.startswith("_")]
    if name not in methods:
        raise ValueError(_unknown(f"{option} method", name, methods, ""))
    return getattr(module, name)()


def _unknown(kind: str, name: str, known: list[str], where: str) -> str:
    near = _near(name, known)
    return f"unknown {kind} {name!r}{where}.{near} Known: {', '.join(known)}."


def _near(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=3)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def matrices_of_layers(tree: Any) -> Any:
    """Which leaves are matrices inside layers: those that GaLore projects here."""

    def is_matrix(path: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        stacks = ("layers/", "blocks/")  # at once, layer by layer
        return name.startswith(stacks) and name.endswith("/kernel")

    return jax.tree_util.tree_map_with_path(is_matrix, tree)
