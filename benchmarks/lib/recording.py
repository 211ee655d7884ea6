# SPDX-License-Identifier: Apache-2.0
"""Runs for the record, and quick ones, which show that a script works."""

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.lib import common


def parser(doc: str | None) -> argparse.ArgumentParser:
    """With the first line of `doc`, and `--quick`."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="small, and not recorded")
    return made


def write(quick: bool, name: str, result: Any, missing: Sequence[str] = ()) -> None:
    """`common.write`, unless the run was a quick one."""
    for reason in missing:
        print(f"skipped: {reason}")
    if quick:
        print(f"quick: {name} is not recorded")
        return
    common.write(name, result, missing)
