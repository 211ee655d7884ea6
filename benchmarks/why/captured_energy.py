# SPDX-License-Identifier: Apache-2.0
"""How much gradient energy do warm-started bases capture, next to the exact ones?

Trains the demo's model with GaLore and stops at every refresh: from the projectors in
use and the gradient of that step, each method finds new ones, and their captured energy
is divided by that of the exact basis, for every matrix of every stacked leaf.

    python -m benchmarks.why.captured_energy [--steps 180] [--gap 50]
"""

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax
from benchmarks.lib import common
from galore_optax import subspace

import demo
from train import open_text

METHODS = {
    "power(steps=1)": subspace.power(steps=1),
    "power(), the default": subspace.power(),
    "power(product_dtype=float32)": subspace.power(product_dtype=jnp.float32),
    "randomized()": subspace.randomized(),
    "random()": subspace.random(),
    "stale, not refreshed": None,
}


def energies(
    method: subspace.Subspace | None, state: Any, gradients: Any
) -> dict[str, np.ndarray]:
    """Captured energy after a refresh of `state` by `method`, by leaf."""
    tx = galore_optax.galore(optax.identity(), rank=demo.RANK, subspace=method)
    state = tx.init(gradients)._replace(
        count=state.count,
        key=state.key,
        projector=state.projector,
        refresh=state.refresh,
    )
    _, after = tx.update(gradients, state, refresh=method is not None)
    found = galore_optax.captured_energy(tx, after, gradients)
    return {path: np.asarray(energy) for path, energy in found.items()}


def galore_state(opt_state: Any) -> galore_optax.GaLoreState:
    def is_state(node: Any) -> bool:
        return isinstance(node, galore_optax.GaLoreState)

    nodes = jax.tree.leaves(opt_state, is_leaf=is_state)
    return next(node for node in nodes if is_state(node))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=demo.GALORE.steps)
    parser.add_argument("--gap", type=int, default=demo.GAP)
    arguments = parser.parse_args()
    options = (f"rank={demo.RANK}", f"update_proj_gap={arguments.gap}")
    run = dataclasses.replace(demo.GALORE, options=options, steps=arguments.steps)
    program, text = run.program(), open_text(run)
    state = program.init(program.init_params(run.seed))
    update, _ = program.compiled(state)
    gradients_of = jax.jit(program.gradients)
    rows = []
    for step in range(run.steps):
        batch = program.put(next(text.train))
        if step % arguments.gap == 0:
            _, gradients = gradients_of(state.params, batch)
            rows += measure(step, galore_state(state.opt_state), gradients)
        state, _ = update(state, batch)
    common.write(f"why/captured_energy_gap{arguments.gap}", summary(rows))


def measure(step: int, state: Any, gradients: Any) -> list[dict[str, Any]]:
    exact = energies(subspace.svd(), state, gradients)
    rows = []
    for name, method in METHODS.items():
        found = energies(method, state, gradients)
        shares = np.concatenate([found[path] / exact[path] for path in exact])
        row = {"step": step, "method": name, "share_of_exact": shares.tolist()}
        rows.append(row)
        print(
            f"step {step:4} {name:28} least {shares.min():.4f} mean {shares.mean():.4f}"
        )
    best = np.concatenate(list(exact.values()))
    print(f"step {step:4} exact captures {best.min():.3f} to {best.max():.3f}")
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Least and mean share of the exact basis' energy, over leaves and refreshes."""
    methods: dict[str, Any] = {}
    for name in METHODS:
        shares = np.array([r["share_of_exact"] for r in rows if r["method"] == name])
        methods[name] = {"least": shares.min(), "mean": shares.mean()}
    return {"methods": methods, "rows": rows}


if __name__ == "__main__":
    main()
