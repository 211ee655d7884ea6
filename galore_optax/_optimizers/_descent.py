# SPDX-License-Identifier: Apache-2.0
"""A learning rate and a decay around what projects, and not inside of it."""

from typing import Any

import optax

from galore_optax._arguments import check_mask
from galore_optax._config import Config
from galore_optax._galore import Projecting
from galore_optax._types import Scalar
from galore_optax._wrapping.full_size import with_full_size_rate


def descent(
    direction: optax.GradientTransformation,
    config: Config,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: Scalar,
    mask: Any,
) -> Projecting:
    """`-lr (direction + weight_decay W)`; leaves at full size at their own rate."""
    check_mask(mask)
    decay = optax.add_decayed_weights(weight_decay, mask)
    rate = optax.scale_by_learning_rate(learning_rate)
    tx = optax.with_extra_args_support(optax.chain(direction, decay, rate))
    return Projecting(*with_full_size_rate(tx, config))
