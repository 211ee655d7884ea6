# SPDX-License-Identifier: Apache-2.0
"""Type aliases of the public signatures."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, TypeVar

import jax

T = TypeVar("T")
ProjType: TypeAlias = Literal["std", "reverse_std", "left", "right", "full"]
Scalar: TypeAlias = float | jax.Array
# One for all leaves; a callable of one `Leaf`; or, by regular expressions over paths,
# the first of which that is found decides.
PerLeaf: TypeAlias = T | Callable[[Any], T] | Mapping[str, T]
