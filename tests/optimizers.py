# SPDX-License-Identifier: Apache-2.0
"""Every optimizer that optax exports, and what is expected of it as an inner."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import optax

LR = 0.01


@dataclasses.dataclass(frozen=True)
class Inner:
    make: Callable[[], optax.GradientTransformation]
    use: str  # IGNORED, ADDITIVE or COORDINATES, as classified
    decay: float = 0.0  # lr * weight decay: the part of W that a step removes


def _decayed(name: str, **kwargs: Any) -> Inner:
    factory = getattr(optax, name)
    return Inner(lambda: factory(LR, weight_decay=0.1, **kwargs), "ADDITIVE", LR * 0.1)


def _plain(name: str, **kwargs: Any) -> Inner:
    factory = getattr(optax, name)
    return Inner(lambda: factory(LR, **kwargs), "IGNORED")


def _coordinates(name: str, **kwargs: Any) -> Inner:
    factory = getattr(optax, name)
    return Inner(lambda: factory(LR, **kwargs), "COORDINATES")


INNERS: dict[str, Inner] = {
    "adabelief": _plain("adabelief"),
    "adadelta": _plain("adadelta"),
    "adafactor": _coordinates("adafactor", min_dim_size_to_factor=4),
    "adagrad": _plain("adagrad"),
    "adam": _plain("adam"),
    "adamax": _plain("adamax"),
    "adamaxw": _decayed("adamaxw"),
    "adamw": _decayed("adamw"),
    "adan": Inner(lambda: optax.adan(LR, weight_decay=0.1), "ADDITIVE", LR * 0.1),
    "amsgrad": _plain("amsgrad"),
    "fromage": _coordinates("fromage"),
    "lamb": _coordinates("lamb"),
    "lars": _coordinates("lars"),
    "lion": Inner(lambda: optax.lion(LR, weight_decay=0.1), "ADDITIVE", LR * 0.1),
    "nadam": _plain("nadam"),
    "nadamw": _decayed("nadamw"),
    "novograd": _coordinates("novograd"),
    "optimistic_adam_v2": _plain("optimistic_adam_v2"),
    "optimistic_gradient_descent": _plain("optimistic_gradient_descent"),
    "polyak_sgd": Inner(lambda: optax.polyak_sgd(1.0), "IGNORED"),
    "radam": _plain("radam"),
    "rmsprop": _plain("rmsprop"),
    "rprop": _plain("rprop"),
    "sgd": _plain("sgd", momentum=0.9),
    "sgd, decayed": Inner(
        lambda: optax.chain(
            optax.trace(0.9),
            optax.add_decayed_weights(0.1),
            optax.scale_by_learning_rate(LR),
        ),
        "ADDITIVE",
        LR * 0.1,
    ),
    "sign_sgd": _plain("sign_sgd"),
    "signum": _plain("signum"),
    "sm3": _plain("sm3"),
    "yogi": _plain("yogi"),
}

# Why an exported optimizer is not in the table.
EXCEPTIONS = {
    "noisy_sgd": "draws its noise at full size, in the shape of whatever it is given",
    "lbfgs": "searches along a line with a loss of the full parameters",
    "optimistic_adam": "deprecated by optax in favour of optimistic_adam_v2",
}


def exported() -> set[str]:
    """Names in `optax` of functions that take a learning rate and make an optimizer."""
    found = set()
    for name, value in vars(optax).items():
        if name.startswith(("_", "scale_by", "inject")) or not inspect.isfunction(
            value
        ):
            continue
        if {"learning_rate", "max_learning_rate"} & set(
            inspect.signature(value).parameters
        ):
            found.add(name)
    return found
