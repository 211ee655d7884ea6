# SPDX-License-Identifier: Apache-2.0
"""The command line: python -m galore_optax plan 7b --method adamw galore_adamw8bit."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from galore_optax.memory import _budget
from galore_optax.memory._bytes import parse_size
from galore_optax.memory._configs import config_names
from galore_optax.memory._estimate import plan
from galore_optax.memory._methods import Method, option_names, parse_options
from galore_optax.memory._plot import draw
from galore_optax.memory._setting import DTYPES, Setting
from galore_optax.memory._sizes import Sizes
from galore_optax.memory._table import against_adamw, notes, table

_EXPECTED = (ValueError, TypeError, FileNotFoundError, ImportError, RuntimeError)
_USUAL_RANK = 128  # the default of galore
_SHOWN = 12  # choices of a budget
_DEFAULT = ("adamw", "galore_adamw")
_FOR_BUDGETS = ("adamw", "adamw8bit", "adafactor", "galore_adamw")
_PREALLOCATED = (
    "A budget is what the process may have: JAX takes 75 % of a GPU's memory unless"
    " XLA_PYTHON_CLIENT_MEM_FRACTION is set, as in XLA_PYTHON_CLIENT_MEM_FRACTION=.95."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: without the program's name; those of the process if `None`.

    Returns:
      0; 1 where nothing fits the budget or the target; 2 for an error, which is printed
      without a traceback.
    """
    found = parser().parse_args(arguments)
    return told(lambda: _plan(found))


def told(run: Callable[[], int]) -> int:
    """What `run` returns, its errors printed without a traceback."""
    try:
        return run()
    except _budget.NothingFits as error:
        print(error, file=sys.stderr)
        return 1
    except _EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def chosen(found: argparse.Namespace) -> tuple[Sizes, list[Method], Setting]:
    """The model, the methods and the setting that are asked for."""
    names = found.method or (_FOR_BUDGETS if found.budget else _DEFAULT)
    methods = _methods(names, parse_options(found.option))
    return Sizes.load(found.model), methods, _setting(found)


def _plan(found: argparse.Namespace) -> int:
    sizes, methods, setting = chosen(found)
    budget = parse_size(found.budget) if found.budget else None
    plans = [plan(sizes, with_rank(method, sizes), setting) for method in methods]
    said = filter(None, (table(plans), against_adamw(plans), notes(plans)))
    print(f"{found.model}: {setting}", "", *said, sep="\n", flush=True)
    if found.png:
        draw(plans, found.png, budget, f"{Path(found.model).stem}: {setting}")
        print(f"wrote {found.png}")
    if budget:
        _search(sizes, methods, setting, budget, found)
    return 0


def _setting(found: argparse.Namespace) -> Setting:
    return Setting(
        found.tokens,
        found.batch,
        found.accumulation,
        found.dtype,
        bool(found.remat),
        bool(found.layerwise),
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
    if not method.is_galore or given or quarter >= _USUAL_RANK:
        return method
    return method.with_options(rank=quarter)


def _search(
    sizes: Sizes,
    methods: Sequence[Method],
    setting: Setting,
    budget: int,
    found: argparse.Namespace,
) -> None:
    space = _budget.Space(
        remat=_open(found.remat),
        layerwise=_open(found.layerwise),
    )
    choices = _budget.search(sizes, methods, setting, budget, space)
    print(f"\nwhat fits {found.budget}, by estimate, best first:")
    print(_budget.choices_table(choices[:_SHOWN]))
    if len(choices) > _SHOWN:
        print(f"and {len(choices) - _SHOWN} more")
    print(_PREALLOCATED)


def _open(value: bool | None) -> tuple[bool, ...]:
    return (False, True) if value is None else (value,)


def parser() -> argparse.ArgumentParser:
    whole = argparse.ArgumentParser(prog="python -m galore_optax")
    commands = whole.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser(
        "plan",
        help="what a training step of a LLaMA holds in memory",
        description="Estimates the memory of one training step, term by term; searches"
        " for settings that fit a budget.",
    )
    _add_model(command)
    _add_step(command)
    _add_outputs(command)
    return whole


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", help=f"{', '.join(config_names())}, or the path of a config.json"
    )
    command.add_argument(
        "--method",
        nargs="+",
        metavar="NAME",
        help="optimizers of optax by name, with galore_ before and 8bit after it for"
        " the projected and the 8-bit version; default: adamw galore_adamw, for a"
        " budget also adamw8bit adafactor",
    )
    command.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the methods, such as rank=1024; may be given several times",
    )


def _add_step(command: argparse.ArgumentParser) -> None:
    counts = {
        "tokens": (256, "of one sequence"),
        "batch": (1, "sequences of a micro-batch"),
        "accumulation": (1, "micro-batches of one update"),
    }
    for name, (default, text) in counts.items():
        command.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=text
        )
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="of weights, gradients and activations",
    )
    flags = {
        "remat": "blocks keep only their inputs and compute the rest again",
        "layerwise": "update each layer as soon as its gradient is there",
    }
    for name, text in flags.items():
        command.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text
        )


def _add_outputs(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--budget",
        metavar="SIZE",
        help="such as 24GB: search ranks, 8-bit moments, and whatever of --remat and"
        " --layerwise is not given, smaller micro-batches and sequences",
    )
    command.add_argument("--png", metavar="FILE", help="draw the methods side by side")
