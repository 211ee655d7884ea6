# SPDX-License-Identifier: Apache-2.0
"""Muon inside of the subspace, ready-made."""

import functools
import math
from collections.abc import Callable
from typing import Any, Unpack

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from galore_optax._arguments import check_mask
from galore_optax._config import Projection
from galore_optax._galore import Projecting, config_of, with_defaults, with_projection
from galore_optax._selection.matrices import Matrix, Plan
from galore_optax._transform import projected
from galore_optax._types import Scalar
from galore_optax._wrapping.full_size import with_full_size_rate
from galore_optax.moments import rotate

_MUON = {"scale": 1.0, "moments": rotate()}


@functools.partial(with_projection, defaults=_MUON)
def galore_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    beta: Scalar = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    consistent_rms: float | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    **projection: Unpack[Projection],
) -> optax.GradientTransformationExtraArgs:
    r"""Orthogonalised momentum in the subspace, and AdamW for all other leaves.

    .. math:: M \leftarrow \beta M + (1 - \beta) P^T G, \quad
        W \leftarrow W - lr\,(\mathrm{scale} \cdot c\, P\, \mathrm{ns}(M) + wd\, W),
        \quad c = \sqrt{\max(1, m_{out} / n_{in})}

    with ns the Newton-Schulz iteration of Muon, which brings all singular values near
    1. There is one moment, rank times n entries, where Adam has two. As P has
    orthonormal columns, :math:`P\,\mathrm{ns}(M) = \mathrm{ns}(P M)`: the update is the
    orthogonalised momentum of the projected gradient, and at full rank that of Muon. c
    goes by the sizes of W, and not of its coordinates as in
    `galore(optax.contrib.muon(...))`, which also orthogonalises every matrix that is
    not projected, embeddings among them, and no stack.

    Args:
      learning_rate: number or schedule, of projected leaves; Muon's usual is 2e-2.
      adam_learning_rate: of the others; the same if `None`.
      beta: decay of the momentum.
      nesterov: whether to look ahead along the momentum.
      ns_steps: Newton-Schulz iterations.
      consistent_rms: if given, c is this times the root of the larger side: with 0.2
        updates are as long as AdamW's, and one learning rate serves both.
      b1: decay of the first moment of other leaves.
      b2: decay of their second moment.
      eps: added to the root of the second moment, and to norms.
      weight_decay: decoupled, multiplied by the learning rate and not by `scale`.
      mask: which leaves decay, as in `optax.adamw`; paths are those of params.
      **projection: `rank`, `update_proj_gap` and all else that `galore` takes. If not
        given, `scale` is 1 and `moments` are `moments.rotate()`.

    Returns:
      the transformation; its state is a `GaLoreState`.

    Raises:
      TypeError: `mask` is one value; and as `galore`.
      ValueError: as `galore`.

    Example:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.galore_muon(2e-2, rank=4, adam_learning_rate=1e-3)
      >>> state = tx.init({"kernel": jnp.ones((16, 64))})

    Source: Jordan et al., Muon, 2024; Liu et al., arXiv 2502.16982, for
    `consistent_rms`; SUMO, arXiv 2505.24749, for a momentum that rotates.
    """
    check_mask(mask)
    others = learning_rate if adam_learning_rate is None else adam_learning_rate
    direction = functools.partial(
        scale_by_muon, ns_steps=ns_steps, beta=beta, eps=eps, nesterov=nesterov
    )
    decay = optax.add_decayed_weights(weight_decay, mask)
    adam = optax.chain(
        optax.scale_by_adam(b1, b2, eps), decay, optax.scale_by_learning_rate(others)
    )

    def inner(plan: Plan) -> optax.GradientTransformation:
        muon = optax.chain(
            direction(
                weight_dimension_numbers=plan.arrange(map(_axes, plan.projected))
            ),
            _times(plan, functools.partial(_factor, consistent_rms)),
            decay,
            optax.scale_by_learning_rate(learning_rate),
        )
        labels = ["adam" if full else "muon" for full in plan.is_full]
        names = plan.flat.treedef.unflatten(labels)
        return optax.partition({"muon": muon, "adam": adam}, names)

    config = config_of(with_defaults(_MUON, projection))
    return Projecting(*with_full_size_rate(projected(inner, config), config))


def _axes(matrix: Matrix) -> MuonDimensionNumbers:
    """The sides of the matrix that coordinates are, batch axes in neither."""
    letters = dict(zip(matrix.leaf_letters, range(len(matrix.shape)), strict=True))
    low, side_of = matrix.coordinate_letters, {}
    for side in matrix.sides:
        side_of[side.project.split(",")[0][-1]] = side.axes
    rows, cols = (
        tuple(
            i
            for i, letter in enumerate(low)
            if side_of.get(letter) == axes or letters.get(letter) in axes
        )
        for axes in (matrix.rows, matrix.cols)
    )
    return MuonDimensionNumbers(reduction_axis=cols, output_axis=rows)


def _factor(consistent_rms: float | None, matrix: Matrix) -> float:
    outputs, inputs = matrix.size(matrix.rows), matrix.size(matrix.cols)
    if consistent_rms is not None:
        return math.sqrt(max(outputs, inputs)) * consistent_rms
    return math.sqrt(max(1, outputs / inputs))


def _times(plan: Plan, factor: Callable[[Matrix], float]) -> Any:
    factors = plan.arrange(map(factor, plan.projected))

    def scale(updates: Any, params: Any) -> Any:
        del params
        return jax.tree.map(lambda x, by: x * by, updates, factors)

    return optax.stateless(scale)
