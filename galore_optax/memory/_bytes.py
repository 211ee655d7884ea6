# SPDX-License-Identifier: Apache-2.0
"""Bytes of an optimizer's state by kind, and sizes as text."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax

from galore_optax._asking.held import array_bytes
from galore_optax._asking.held import tree_bytes as tree_bytes
from galore_optax._storage.quantized import MOMENTS

# Of states' fields: those that may be kept in eight bits, and others.
_KINDS_OF_FIELDS = (
    {"scales": "scales", "projector": "projectors"}
    | {
        name: "first_moments" if sign == "signed" else "second_moments"
        for name, sign in MOMENTS.items()
    }
    | dict.fromkeys(("m", "momentum"), "first_moments")
    | dict.fromkeys(("n", "v", "v_row", "v_col", "row", "col"), "second_moments")
)
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
        return {name: size for name, size in vars(self).items() if name != "dtypes"}

    @property
    def total(self) -> int:
        return sum(self.kinds.values())


def state_bytes(state: Any) -> StateBytes:
    """Bytes of `state` by kind, told from the names of its NamedTuples' fields.

    .. math:: \\sum_{x} \\mathrm{size}(x) \\cdot \\mathrm{itemsize}(x)

    The innermost field that is known decides: `scales` of a coded array, `projector` of
    GaLore, `mu`, `trace`, `ema`, `m` for first and `nu`, `v`, `v_row`, `row`, ... for
    second moments; all else is other.

    Args:
      state: arrays or shapes, such as `jax.eval_shape(tx.init, params)`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from galore_optax import memory
      >>> params = {"kernel": jnp.ones((8, 16))}
      >>> memory.state_bytes(optax.adam(1e-3).init(params))
      StateBytes(projectors=0, first_moments=512, second_moments=512, scales=0, other=4)
    """
    found: dict[str, dict[str, int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        parts, name = found.setdefault(_kind(path), {}), _short(leaf.dtype)
        parts[name] = parts.get(name, 0) + array_bytes(leaf)
    totals = {kind: sum(parts.values()) for kind, parts in found.items()}
    moments = {kind: parts for kind, parts in found.items() if "moments" in kind}
    return StateBytes(**totals, dtypes=moments)


def _short(dtype: Any) -> str:
    """As in f32, bf16, int8."""
    return str(dtype).replace("float", "f")


def _kind(path: tuple[Any, ...]) -> str:
    fields = (str(getattr(key, "name", "")) for key in reversed(path))
    kinds = (_KINDS_OF_FIELDS[name] for name in fields if name in _KINDS_OF_FIELDS)
    return next(kinds, "other")


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
