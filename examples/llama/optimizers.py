# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name, and the leaves that they treat in their own way."""

import operator
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from galore_optax import memory


def make(
    name: str, learning_rate: optax.ScalarOrSchedule, options: dict[str, Any]
) -> optax.GradientTransformation:
    """The optimizer called `name`, as `galore_optax.memory` calls it, or `muon`.

    Raises:
      ValueError: an unknown name or option; the nearest known ones are offered.
      TypeError: an unknown option of `muon`.
    """
    if name == "muon":
        return muon(learning_rate, **options)
    return memory.Method(name, tuple(options.items())).make(learning_rate)


def muon(
    learning_rate: optax.ScalarOrSchedule, **options: Any
) -> optax.GradientTransformation:
    """Optax' Muon for the matrices of layers, and AdamW for embedding, head and norms.

    By itself it would orthogonalise every leaf of two axes, and give others NAdam.
    """
    axes = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    turned = optax.contrib.muon(
        learning_rate, muon_weight_dimension_numbers=axes, **options
    )
    decay = options.get("weight_decay", 0.0)
    others = optax.adamw(learning_rate, weight_decay=decay)
    return optax.partition({True: turned, False: others}, matrices_of_layers)


def matrices_of_layers(tree: Any) -> Any:
    """Which leaves are matrices inside layers: kernels, or the factors of adapters."""

    def is_matrix(path: Any, leaf: Any) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        stacks = ("layers/", "blocks/")  # at once, layer by layer
        return name.startswith(stacks) and name.endswith(("/kernel", "/a", "/b"))

    return jax.tree_util.tree_map_with_path(is_matrix, tree)


def fix_matrices(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` for all but the matrices of layers, which do not change."""

    def others(tree: Any) -> Any:
        return jax.tree.map(operator.not_, matrices_of_layers(tree))

    fixed = optax.masked(optax.set_to_zero(), matrices_of_layers)
    return optax.chain(optax.masked(tx, others), fixed)
