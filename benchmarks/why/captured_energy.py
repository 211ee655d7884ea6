# SPDX-License-Identifier: Apache-2.0
"""How much gradient energy do warm-started bases capture, next to the exact ones?

Trains the demo's model with GaLore and stops at every refresh: from the projectors in
use and the gradient of that step, each method finds new ones, and their captured energy
is divided by that of the exact basis, for every matrix of every stacked leaf.

    python -m benchmarks.why.captured_energy [--steps 400] [--gap 50]
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax
from benchmarks.lib import records
from benchmarks.lib.subjects import galore_state
from benchmarks.why import tables
from benchmarks.why.why_it_works import stops
from galore_optax import subspace

import demo

METHODS = {
    "power(steps=1)": subspace.power(steps=1),
    "power(), the default": subspace.power(),
    "power(product_dtype=float32)": subspace.power(product_dtype=jnp.float32),
    "randomized()": subspace.randomized(),
    "random()": subspace.random(),
    "stale, not refreshed": None,
}


def energies(method: subspace.Subspace | None, state: Any, gradients: Any) -> Any:
    """Captured energy after a refresh of `state` by `method`, over all matrices."""
    tx = galore_optax.galore(optax.identity(), rank=demo.RANK, subspace=method)
    state = state._replace(inner_state=tx.init(gradients).inner_state)
    _, after = tx.update(gradients, state, refresh=method is not None)
    found = galore_optax.captured_energy(tx, after, gradients)
    return np.concatenate(list(map(np.asarray, found.values())))


def measure(step: int, state: Any, gradients: Any) -> list[dict[str, Any]]:
    exact = energies(subspace.svd(), state, gradients)
    print(f"step {step}: exact ones capture {exact.min():.3f} to {exact.max():.3f}")
    return [
        {
            "step": step,
            "method": name,
            "share_of_exact": (energies(method, state, gradients) / exact).tolist(),
        }
        for name, method in METHODS.items()
    ]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Least and mean share of the exact basis' energy, over leaves and refreshes."""
    methods: dict[str, Any] = {}
    for name in METHODS:
        shares = np.array([r["share_of_exact"] for r in rows if r["method"] == name])
        methods[name] = {"least": shares.min(), "mean": shares.mean()}
    return {"methods": methods, "rows": rows}


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--steps", type=int, default=demo.GALORE.steps)
    parser.add_argument("--gap", type=int, default=demo.GAP)
    arguments = parser.parse_args()
    options = (f"rank={demo.RANK}", f"update_proj_gap={arguments.gap}")
    run = dataclasses.replace(demo.GALORE, options=options, steps=arguments.steps)
    program, rows = run.program(), []
    gradients_of = jax.jit(program.gradients)
    for stop in stops(run, program, arguments.gap):
        if stop.step < run.steps:
            _, gradients = gradients_of(stop.state.params, stop.batch)
            state = galore_state(stop.state.opt_state)
            rows += measure(stop.step, state, gradients)
    found = summary(rows)
    print(tables.captured_energy(found))
    records.write(f"why/captured_energy_gap{arguments.gap}", found)


if __name__ == "__main__":
    main()
