# SPDX-License-Identifier: Apache-2.0
"""Type aliases of the public signatures."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

import jax

T = TypeVar("T")
ProjType: TypeAlias = Literal["std", "reverse_std", "left", "right", "full"]
Scalar: TypeAlias = float | jax.Array
PerLeaf: TypeAlias = T | Callable[[Any], T]
