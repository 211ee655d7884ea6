# SPDX-License-Identifier: Apache-2.0
"""The command line: python -m galore_optax plan 7b --method adamw galore_adamw8bit."""

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from galore_optax.memory._cards import CARDS, PREALLOCATED, Budget, budget_of
from galore_optax.memory._methods import Method, option_names, parse_options
from galore_optax.memory._model import (
    DTYPES,
    FORMED,
    NEVER,
    Setting,
    Sizes,
    config_names,
)
from galore_optax.memory._plan import plan
from galore_optax.memory._search import Choice, NothingFits, search
from galore_optax.memory._show import (
    against_adamw,
    draw,
    gigabytes,
    notes,
    ruled,
    table,
)

_EXPECTED = (ValueError, TypeError, FileNotFoundError, ImportError, RuntimeError)
_SHOWN = 12  # choices of a budget
_DEFAULT = ("adamw", "galore_adamw")
_FOR_BUDGETS = ("adamw", "adamw8bit", "adafactor", "galore_adamw")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: without the program's name; those of the process if `None`.

    Returns:
      0; 1 where nothing fits the budget; 2 for an error, which is printed without a
      traceback.
    """
    found = parser().parse_args(arguments)
    return told(lambda: _plan(found))


def told(run: Callable[[], int]) -> int:
    """What `run` returns, its errors printed without a traceback."""
    try:
        return run()
    except NothingFits as error:
        print(error, file=sys.stderr)
        return 1
    except _EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="python -m galore_optax")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    text = "what a training step of a LLaMA holds in memory"
    command = commands.add_parser("plan", help=text, description=text)
    _add_model(command.add_argument)
    _add_step(command.add_argument)
    return whole


def _add_model(add: Callable[..., Any]) -> None:
    add("model", help=f"{', '.join(config_names())}, or the path of a config.json")
    text = (
        "optimizers of optax by name, with galore_ before and 8bit after it for the"
        " projected and the 8-bit version; default: adamw galore_adamw, for a budget"
        " also adamw8bit adafactor"
    )
    add("--method", nargs="+", metavar="NAME", help=text)
    text = "of the methods, such as rank=1024 or 0.25; may be given several times"
    add("--option", action="append", default=[], metavar="NAME=VALUE", help=text)
    text = (
        f"such as 24GB, or {', '.join(CARDS)}: search ranks, 8-bit moments, and what of"
        " --remat, --layerwise and --gradients is not given"
    )
    add("--budget", metavar="SIZE", help=text)
    text = (
        f"of the budget, such as 0.9 or 90%%; default: the {PREALLOCATED:.0%}% that JAX"
        " takes of a GPU by name, all of a TPU or of a size"
    )
    add("--share", metavar="SHARE", help=text)
    add("--png", metavar="FILE", help="draw the methods side by side")


def _add_step(add: Callable[..., Any]) -> None:
    number: dict[str, Any] = {"type": int, "metavar": "N"}
    add("--tokens", default=256, help="of one sequence", **number)
    add("--batch", default=1, help="sequences of a micro-batch", **number)
    add("--accumulation", default=1, help="micro-batches of one update", **number)
    text = "of weights, gradients and activations"
    add("--dtype", choices=DTYPES, default="bfloat16", help=text)
    flag = argparse.BooleanOptionalAction
    text = "blocks keep only their inputs and compute the rest again"
    add("--remat", action=flag, default=None, help=text)
    text = "update each layer as soon as its gradient is there"
    add("--layerwise", action=flag, default=None, help=text)
    text = "never: those of matrices are projected while they are made"
    add("--gradients", choices=(FORMED, NEVER), help=text)
    text = "of that: a refresh of a share of the leaves at a time"
    add("--refresh-shares", default=1, help=text, **number)


def chosen(found: argparse.Namespace) -> tuple[Sizes, list[Method], Setting]:
    """The model, the methods and the setting that are asked for."""
    names = found.method or (_FOR_BUDGETS if found.budget else _DEFAULT)
    methods = _methods(names, parse_options(found.option))
    counts = found.tokens, found.batch, found.accumulation, found.dtype
    how = bool(found.remat), bool(found.layerwise), found.gradients or FORMED
    setting = Setting(*counts, *how, found.refresh_shares)
    return Sizes.load(found.model), methods, setting


def _plan(found: argparse.Namespace) -> int:
    sizes, methods, setting = chosen(found)
    budget = _budget(found)
    plans = [plan(sizes, with_rank(method, sizes), setting) for method in methods]
    said = filter(None, (table(plans), against_adamw(plans), notes(plans)))
    print(f"{found.model}: {setting}", "", *said, sep="\n", flush=True)
    if found.png:
        line = budget.bytes if budget else None
        draw(plans, found.png, line, f"{Path(found.model).stem}: {setting}")
        print(f"wrote {found.png}")
    if budget:
        print(f"\n{_allowed(budget)}", flush=True)
        choices = search(sizes, methods, _settings(setting, found), budget.bytes)
        _show(choices)
    return 0


def _show(choices: Sequence[Choice]) -> None:
    print("\nwhat fits, by estimate, the largest rank first:")
    print(_shown(choices[:_SHOWN]))
    if len(choices) > _SHOWN:
        print(f"and {len(choices) - _SHOWN} more")


def _budget(found: argparse.Namespace) -> Budget | None:
    if found.budget:
        return budget_of(found.budget, found.share)
    if found.share is not None:
        raise ValueError(
            f"share={found.share} is a part of a budget, and none is given. Add"
            " --budget, such as --budget rtx4090."
        )
    return None


def _allowed(budget: Budget) -> str:
    """What a process may have, and how it comes to have it."""
    told = f"{budget.name}: {gigabytes(budget.bytes)} for this process"
    if budget.share < 1:
        told += f", {budget.share:.4g} of {gigabytes(budget.whole)}"
    return f"{told}{_how(budget)}"


def _how(budget: Budget) -> str:
    """The rest of the sentence: what a program has to be told for that."""
    variable = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    if budget.is_gpu and budget.share == PREALLOCATED:
        return (
            ", which is what JAX takes of a GPU. For more, start your program with"
            f" {variable}=.95, and add --share .95 here."
        )
    if budget.name in CARDS and not budget.is_gpu:
        return "."
    if budget.share < 1:
        return f". Start your program with {variable}={budget.share:.4g}."
    return (
        f". JAX takes {PREALLOCATED:.0%} of a GPU: add --share {PREALLOCATED} if this"
        f" is the size of one, or set {variable}."
    )


def _methods(names: Sequence[str], options: dict[str, Any]) -> list[Method]:
    """Each method with those options that it knows.

    Raises:
      ValueError: an unknown method, or an option that none of them knows.
    """
    known = {name: option_names(name) for name in names}
    for option in options:
        if not any(option in names for names in known.values()):
            richest = max(known, key=lambda name: len(known[name]))
            Method(richest, ((option, options[option]),)).make()  # names the nearest
    return [
        Method(name, tuple((k, v) for k, v in options.items() if k in known[name]))
        for name in names
    ]


def with_rank(method: Method, sizes: Sizes) -> Method:
    """A quarter of the width where none is given and the default is more."""
    quarter = max(sizes.width // 4, 1)
    given = "rank" in dict(method.options)
    if not method.is_galore or given or quarter >= method.rank:
        return method
    return method.with_options(rank=quarter)


def _settings(setting: Setting, found: argparse.Namespace) -> list[Setting]:
    """With every value of what is not given."""
    gradients = [found.gradients] if found.gradients else [FORMED, NEVER]
    ways = itertools.product(_open(found.remat), _open(found.layerwise), gradients)
    return [
        dataclasses.replace(setting, remat=remat, layerwise=by_layer, gradients=made)
        for remat, by_layer, made in ways
        if not (by_layer and made == NEVER)
    ]


def _open(value: bool | None) -> tuple[bool, ...]:
    return (False, True) if value is None else (value,)


def _shown(choices: Sequence[Choice]) -> str:
    rows = [["", "rank", "total", "with"]]
    for choice in choices:
        rank, saved = str(choice.rank or "full"), ", ".join(choice.savings)
        rows.append([choice.method.name, rank, gigabytes(choice.plan.total), saved])
    return ruled(rows, after=(0,))
