# SPDX-License-Identifier: Apache-2.0
"""Bytes of optimizer state of the three spellings, for the LLaMA of the demo.

python -m benchmarks.memory.state_bytes
"""

import warnings

import jax
import optax

import galore_optax
from benchmarks.lib import records
from benchmarks.memory import tables
from galore_optax import galore, galore_adamw

import demo

RANK = 64
SPELLINGS = {
    "optax.adamw(lr)": lambda: optax.adamw(1e-3),
    "galore(optax.adamw(lr), rank=64)": lambda: galore(optax.adamw(1e-3), rank=RANK),
    "galore_optax.chain(galore(rank=64), optax.adamw(lr))": lambda: galore_optax.chain(
        galore(rank=RANK), optax.adamw(1e-3)
    ),
    "optax.chain(galore(rank=64), optax.adamw(lr))": lambda: optax.chain(
        galore(rank=RANK), optax.adamw(1e-3)
    ),
    "galore_adamw(lr, rank=64)": lambda: galore_adamw(1e-3, rank=RANK),
    "optax.contrib.galore(lr, rank=64)": lambda: optax.contrib.galore(1e-3, rank=RANK),
}


def main() -> None:
    warnings.simplefilter("ignore")
    params = demo.ADAMW.program().init_params(0)
    found = {
        name: sum(x.nbytes for x in jax.tree.leaves(make().init(params)))
        for name, make in SPELLINGS.items()
    }
    print(tables.state_bytes(found))
    records.write("memory/state_bytes", found)


if __name__ == "__main__":
    main()
