# SPDX-License-Identifier: Apache-2.0
"""What a GaLore step asks of each device, LLaMA-7B in bf16, over numbers of devices.

Counted from shapes, with weights split along the kept axis: no device, no time.

    products      2 m n r FLOPs to project and as many to lift, of every matrix, over N
    gathered      projectors, twice a step, but for the part that a device has
    dealt out     of a refresh: gradients and old projectors to their owners, new ones
                  back; (N - 1) / N of what a device has
    matrices      that a device renews, at most

python -m benchmarks.memory.weak_scaling
"""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.lib import records
from benchmarks.memory import tables
from benchmarks.memory.state_per_device import DEVICES, RANK, mesh_of, split
from galore_optax import galore_adamw8bit
from galore_optax._asking.record import galore_states, heard
from galore_optax._context import Declared, within
from galore_optax._placing.given import given
from galore_optax._placing.state import per_device
from galore_optax._projector.owners import owners_of


def matrices_each(params: Any, plan: Any, projectors: Any) -> int:
    """That one device renews, of every kind the share rounded up."""
    gradients = [leaf for _, leaf in plan.pairs()]
    with within(declared=Declared(given(params).leaves, ())):
        owners = owners_of(plan, gradients, [(x,) for x in projectors])
        if owners is None:  # one device
            return sum(plan.counts)
        kinds = owners.kinds(gradients)
    return sum(bundle.deal.each for kind in kinds for bundle in kind.bundles)


def row(devices: int) -> dict[str, Any]:
    params = split(mesh_of(devices), "hidden", jnp.bfloat16)
    tx = galore_adamw8bit(1e-3, rank=RANK)
    records_, state = heard(tx, jax.tree.map(lambda x: x.update(sharding=None), params))
    (galore,) = galore_states(records_, state)
    plan, projectors = records_[0].plan, jax.tree.leaves(galore.projector)
    held = per_device(tx, params, state)
    assert held is not None
    entries = sum(math.prod(x.shape) for _, x in plan.pairs())
    bases = sum(x.size * x.dtype.itemsize for x in projectors)
    sent = (devices - 1) / devices
    return {
        "devices": devices,
        "state_bytes": held.bytes,
        "product_flops": 4 * RANK * entries / devices,
        "gathered_bytes": 2 * bases * sent,
        "dealt_bytes": (2 * entries + 2 * bases) / devices * sent,
        "matrices": matrices_each(params, plan, projectors),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    found = {"model": "7b", "rank": RANK, "rows": [row(n) for n in DEVICES]}
    print(tables.weak_scaling(found))
    records.write("memory/weak_scaling", found)


if __name__ == "__main__":
    main()
