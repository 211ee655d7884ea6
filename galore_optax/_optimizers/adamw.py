# SPDX-License-Identifier: Apache-2.0
"""GaLore with AdamW, ready-made, in f32 and in eight bits."""

import functools
from collections.abc import Callable
from typing import Any, Unpack

import optax

from galore_optax._arguments import check_mask
from galore_optax._config import Projection
from galore_optax._galore import galore, with_projection
from galore_optax._storage.quantized import quantized
from galore_optax._types import Scalar
from galore_optax.codes import Code


@with_projection
def galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-4,
    mask: Any | Callable[[Any], Any] | None = None,
    **projection: Unpack[Projection],
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW on low-rank projections of the gradients.

    .. math:: W \leftarrow W - lr\,(\mathrm{scale} \cdot P\,\mathrm{adam}(P^T G)
        + wd\, W)

    Equal to `galore(optax.adamw(learning_rate, ...), ...)`.

    Args:
      learning_rate: number or schedule; shared by projected and other leaves. The
        published recipes use 1e-2 with scale 0.25, ten times AdamW's usual.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment, as in Optax.
      weight_decay: decoupled, multiplied by the learning rate and not by `scale`.
      mask: which leaves decay, as in `optax.adamw`; paths are those of params.
      **projection: `rank`, `update_proj_gap` and all else that `galore` takes.

    Returns:
      the transformation; its state is a `GaLoreState`.

    Raises:
      TypeError: `mask` is one value; and as `galore`.
      ValueError: as `galore`.

    Example:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.galore_adamw(1e-2, rank=4, weight_decay=0.1)
      >>> state = tx.init({"kernel": jnp.ones((16, 64))})

    Source: arXiv 2403.03507, Algorithm 2; Loshchilov and Hutter, arXiv 1711.05101.
    """
    check_mask(mask)
    adamw = optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask
    )
    return galore(adamw, **projection)


@functools.partial(with_projection, without="moment_dtype")
def galore_adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 1e-4,
    mask: Any | Callable[[Any], Any] | None = None,
    code: Code | None = None,
    **projection: Unpack[Projection],
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW on low-rank projections of the gradients, its moments in eight bits.

    .. math:: W \leftarrow W - lr\,(\mathrm{scale} \cdot P\,\mathrm{adam}(P^T G)
        + wd\, W)

    Equal to `galore(quantized(optax.adamw(learning_rate, ...), code=code), ...)`. The
    moments of leaves that are not projected are stored in eight bits too.

    Args:
      learning_rate: number or schedule; shared by projected and other leaves.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment, as in Optax and bitsandbytes.
      weight_decay: decoupled, multiplied by the learning rate and not by `scale`. The
        reference's 8-bit AdamW has 1e-2.
      mask: which leaves decay, as in `optax.adamw`; paths are those of params.
      code: see `quantized`; `codes.dynamic()` is that of the reference.
      **projection: `rank`, `update_proj_gap`, ... of `galore`.

    Returns:
      the transformation; its state is a `GaLoreState`.

    Raises:
      TypeError: `mask` is one value; and as `galore` and `quantized`.
      ValueError: as `galore` and `quantized`.

    Example:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.galore_adamw8bit(1e-2, rank=32)
      >>> state = tx.init({"kernel": jnp.ones((128, 256))})
      >>> state.inner_state[0].mu["kernel"].codes.dtype
      dtype('int8')

    Source: arXiv 2403.03507, section 5; Dettmers et al., arXiv 2110.02861.
    """
    if "moment_dtype" in projection:
        raise TypeError(
            "galore_adamw8bit keeps moments in eight bits and takes no moment_dtype."
            " Choose how they are coded by `code`, or use galore_adamw."
        )
    check_mask(mask)
    adamw = optax.adamw(
        learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=mask
    )
    return galore(quantized(adamw, code=code), **projection)
