# SPDX-License-Identifier: Apache-2.0
"""Bytes of an optimizer's state by kind, and sizes as text."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from galore_optax._asking.held import array_bytes
from galore_optax._asking.held import tree_bytes as tree_bytes

_FIRST = frozenset({"mu", "m", "trace", "ema", "momentum"})
_SECOND = frozenset({"nu", "nu_max", "n", "v", "v_row", "v_col", "row", "col"}) | {
    "sum_of_squares",
    "e_g",
    "e_x",
}
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    f"{letter}IB": 2 ** (10 * power) for power, letter in enumerate("KMGT", 1)
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*")


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes of an optimizer's state by kind; the kinds add up to the whole."""

    projectors: int = 0
    first_moments: int = 0
    second_moments: int = 0
    scales: int = 0  # of codes of fewer bits
    other: int = 0  # counters, keys, and whatever has no name known here
    dtypes: Mapping[str, Mapping[str, int]] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )  # of each kind of moments, its bytes by dtype

    @property
    def kinds(self) -> dict[str, int]:
        return {name: vars(self)[name] for name in _KINDS}

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


_KINDS = tuple(x.name for x in dataclasses.fields(StateBytes) if x.name != "dtypes")
_MOMENTS = ("first_moments", "second_moments")


def state_bytes(state: Any) -> StateBytes:
    """Bytes of `state` by kind, told from the names of its NamedTuples' fields.

    .. math:: \\sum_{x} \\mathrm{size}(x) \\cdot \\mathrm{itemsize}(x)

    The innermost field that is known decides: `scales` of a coded array, `projector` of
    GaLore, `mu`, `trace`, `ema`, `m` for first and `nu`, `v`, `v_row`, `row`, ... for
    second moments; all else is other.

    Args:
      state: arrays or shapes, such as `jax.eval_shape(tx.init, params)`.

    Returns:
      a `StateBytes`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from galore_optax import memory
      >>> params = {"kernel": jnp.ones((8, 16))}
      >>> memory.state_bytes(optax.adam(1e-3).init(params))
      StateBytes(projectors=0, first_moments=512, second_moments=512, scales=0, other=4)
    """
    found = dict.fromkeys(_KINDS, 0)
    dtypes: dict[str, dict[str, int]] = {kind: {} for kind in _MOMENTS}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        kind, size = _kind(path), array_bytes(leaf)
        found[kind] += size
        if kind in _MOMENTS:
            name = _short(leaf.dtype)
            dtypes[kind][name] = dtypes[kind].get(name, 0) + size
    return StateBytes(**found, dtypes=dtypes)


def _short(dtype: Any) -> str:
    """As in f32, bf16, int8."""
    return str(jnp.dtype(dtype).name).replace("float", "f")


def _kind(path: tuple[Any, ...]) -> str:
    fields = [str(getattr(key, "name", "")) for key in path]
    for name in reversed(fields):
        if name == "scales":
            return "scales"
        if name == "projector":
            return "projectors"
        if name in _FIRST:
            return "first_moments"
        if name in _SECOND:
            return "second_moments"
    return "other"


def parse_size(text: str) -> int:
    """Bytes from a size such as `24GB`, `80GiB` or `500 MB`.

    Args:
      text: a number with B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB
        (powers of 1024); without a unit it is bytes.

    Raises:
      ValueError: it is no such size, or zero.

    Example:
      >>> from galore_optax import memory
      >>> memory.parse_size("24GB"), memory.parse_size("1GiB")
      (24000000000, 1073741824)
    """
    match = _SIZE.fullmatch(text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) == 0:
        raise ValueError(
            f"{text!r} is no size of memory. Write a positive number and a unit: 24GB"
            " (10^9 bytes), 24GiB (2^30), 500MB."
        )
    return round(float(match[1]) * unit)
