# SPDX-License-Identifier: Apache-2.0
"""Why low-rank projection works, measured in a real training run.

Trains the demo's LLaMA with GaLore and stops at every refresh, before the step.

    python -m benchmarks.why.why_it_works pictures [--steps 400] [--gap 50]

The singular values of the gradients, the bases before and after, the energy they
capture, and the singular values of W - W_0; then the same run with AdamW, for its
W - W_0. Draws `docs/images/{spectrum,overlap,energy,update_rank}.png`; `draw` does so
again from the record.

    python -m benchmarks.why.why_it_works methods

From the projectors in use and the gradient of that step, each subspace method finds new
ones, and their captured energy is divided by that of the exact basis.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import galore_optax
from benchmarks.lib import records
from benchmarks.lib.shapes import named
from benchmarks.lib.subjects import galore_state
from benchmarks.why import draw, spectra, tables
from galore_optax import subspace

import demo
from settings import Settings
from steps import Program, State
from train import open_text

INDEX_STEP = 4  # singular values on record: every fourth, and the first


class Stop(NamedTuple):
    """A run before one of its steps."""

    step: int
    state: State
    batch: jax.Array  # of this step
    following: jax.Array  # of the next: the same weights, other text


def stops(run: Settings, program: Program, every: int) -> Iterator[Stop]:
    """At step 0, at every multiple of `every`, and at the end."""
    text = open_text(run)
    state = program.init(program.init_params(run.seed))
    update, _ = program.compiled(state)
    batch = program.put(next(text.train))
    for step in range(run.steps + 1):
        following = program.put(next(text.train))
        if step % every == 0:
            yield Stop(step, state, batch, following)
        state, _ = update(state, batch)
        batch = following


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """Leaves as host arrays; a projector has the path of its matrix."""
    return {path: np.array(leaf) for path, leaf in named(tree).items()}


def projectors(opt_state: Any) -> dict[str, np.ndarray]:
    return by_path(galore_state(opt_state).projector)


@dataclasses.dataclass(frozen=True)
class Probe:
    """What is measured at a stop; every array is (layers, ...), by path."""

    spectrum: dict[str, np.ndarray]  # singular values of the gradient
    basis: dict[str, np.ndarray]  # found at this stop
    other_basis: dict[str, np.ndarray]  # from the next batch instead
    energy: dict[str, dict[str, np.ndarray]]  # by name in ENERGIES
    weights: dict[str, np.ndarray]


OWN, OTHER, OLD = "new, its own batch", "new, the next batch", "old, before refresh"
ENERGIES = (OWN, OTHER, OLD)


class Prober:
    """Compiled once for all stops."""

    def __init__(self, program: Program):
        tx = program.tx

        def refresh(gradients: Any, state: State) -> Any:
            return tx.update(gradients, state.opt_state, state.params)[1]

        def energy(opt_state: Any, gradients: Any) -> dict[str, jax.Array]:
            return galore_optax.captured_energy(tx, opt_state, gradients)

        self.gradients = jax.jit(lambda *x: program.gradients(*x)[1])
        self.refresh, self.energy = jax.jit(refresh), jax.jit(energy)

    def __call__(self, stop: Stop) -> Probe:
        gradients = self.gradients(stop.state.params, stop.batch)
        others = self.gradients(stop.state.params, stop.following)
        before = stop.state.opt_state
        after = self.refresh(gradients, stop.state)
        basis = projectors(after)
        found = {OWN: self.energy(after, gradients), OTHER: self.energy(after, others)}
        found[OLD] = self.energy(before, gradients)
        arrays = by_path(gradients)
        return Probe(
            {path: spectra.singular_values(arrays[path]) for path in basis},
            basis,
            projectors(self.refresh(others, stop.state)),
            {name: jax.tree.map(np.asarray, found[name]) for name in ENERGIES},
            weights_of(stop.state, basis),
        )


def weights_of(state: State, paths: Any) -> dict[str, np.ndarray]:
    arrays = by_path(state.params)
    return {path: arrays[path] for path in paths}


def kind(path: str) -> str:
    """attn/q for layers/attn/q/kernel."""
    return "/".join(path.split("/")[1:-1])


def rounded(values: Any, digits: int = 4) -> Any:
    """Nested lists with so many significant digits."""
    if np.ndim(values):
        return [rounded(value, digits) for value in values]
    return float(f"{float(values):.{digits}g}")


def indices(count: int) -> list[int]:
    """Which of `count` singular values are put on record, counted from 1."""
    return sorted({1, *range(INDEX_STEP, count + 1, INDEX_STEP)})


def spectrum_of(probes: list[Probe]) -> dict[str, Any]:
    """Singular values over the largest, the median over layers."""
    found = {}
    for path in probes[0].spectrum:
        values = np.array([spectra.normalised(p.spectrum[path]) for p in probes])
        chosen = np.array(indices(values.shape[-1])) - 1
        found[kind(path)] = rounded(np.median(values, axis=1)[:, chosen], 3)
    return {"index": (chosen + 1).tolist(), "by_matrix": found}


def overlap_of(probes: list[Probe]) -> dict[str, Any]:
    """By matrix (refresh, layer), and between every two refreshes (the median)."""
    paths = list(probes[0].basis)
    bases = {path: np.array([p.basis[path] for p in probes]) for path in paths}
    others = {path: np.array([p.other_basis[path] for p in probes]) for path in paths}

    def by_matrix(one: Any, other: Any) -> dict[str, Any]:
        return {
            kind(path): rounded(spectra.overlap(one(path), other(path)))
            for path in paths
        }

    def median(one: int, other: int) -> float:
        found = [spectra.overlap(bases[x][one], bases[x][other]) for x in paths]
        return float(np.median(np.concatenate(found)))

    stops = range(len(probes))
    return {
        "successive": by_matrix(lambda x: bases[x][:-1], lambda x: bases[x][1:]),
        "same_weights_next_batch": by_matrix(bases.get, others.get),
        "random": {
            kind(path): rounded(demo.RANK / x.shape[-2]) for path, x in bases.items()
        },
        "every_two": rounded([[median(i, j) for j in stops] for i in stops]),
    }


def energy_of(probes: list[Probe]) -> dict[str, Any]:
    """By name and matrix, (stop, layer); no basis is old at the first stop."""
    return {
        name: {
            kind(path): [
                rounded(probe.energy[name][path])
                for probe in (probes[1:] if name == OLD else probes)
            ]
            for path in probes[0].basis
        }
        for name in ENERGIES
    }


def update_of(weights: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """Of W - W_0: ranks (stop, layer) by matrix, and spectra (stop, index), medians."""
    first, *later = weights
    values = {
        path: np.array([spectra.singular_values(w[path] - first[path]) for w in later])
        for path in first
    }
    everything = np.concatenate(list(values.values()), axis=1)  # (stop, matrix, index)
    chosen = np.array(indices(everything.shape[-1])) - 1
    medians = np.median(spectra.normalised(everything), axis=1)
    ranks = {
        name: {kind(path): rounded(rank(x)) for path, x in values.items()}
        for name, rank in spectra.RANKS.items()
    }
    return {"ranks": ranks, "spectrum": rounded(medians[:, chosen], 3)}


def measure_galore(run: Settings, gap: int) -> tuple[list[Probe], list[int]]:
    """Probes and the steps before which they were taken."""
    program, probes, steps = run.program(), [], []
    probe = Prober(program)
    for stop in stops(run, program, gap):
        probes.append(probe(stop))
        steps.append(stop.step)
        shares = [np.mean(x) for x in probes[-1].energy[OWN].values()]
        print(f"step {stop.step}: new bases capture {np.mean(shares):.3f}", flush=True)
    return probes, steps


def measure(galore: Settings, adamw: Settings, gap: int) -> dict[str, Any]:
    probes, steps = measure_galore(galore, gap)
    paths = list(probes[0].basis)
    program = adamw.program()
    weights = [weights_of(s.state, paths) for s in stops(adamw, program, gap)]
    return {
        "setting": setting_of(galore, adamw, gap),
        "steps": steps,
        "spectrum": spectrum_of(probes),
        "overlap": overlap_of(probes),
        "energy": energy_of(probes),
        "update": {
            "GaLore": update_of([p.weights for p in probes]),
            "AdamW": update_of(weights),
        },
    }


def setting_of(galore: Settings, adamw: Settings, gap: int) -> dict[str, Any]:
    return {
        "rank": demo.RANK,
        "gap": gap,
        "width": galore.config.width,
        "layers": galore.config.layers,
        "steps": galore.steps,
        "tokens_a_step": galore.batch * galore.tokens,
        "seed": galore.seed,
        "threshold": spectra.THRESHOLD,
        "learning_rates": [galore.learning_rate, adamw.learning_rate],
        "options": [list(galore.options), list(adamw.options)],
    }


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


def shares(step: int, state: Any, gradients: Any) -> list[dict[str, Any]]:
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


def compare_methods(run: Settings, gap: int) -> dict[str, Any]:
    program, rows = run.program(), []
    gradients_of = jax.jit(program.gradients)
    for stop in stops(run, program, gap):
        if stop.step < run.steps:
            _, gradients = gradients_of(stop.state.params, stop.batch)
            rows += shares(stop.step, galore_state(stop.state.opt_state), gradients)
    return summary(rows)


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("part", choices=("pictures", "methods"))
    parser.add_argument("--steps", type=int, default=demo.GALORE.steps)
    parser.add_argument("--gap", type=int, default=demo.GAP)
    arguments = parser.parse_args()
    steps, gap = arguments.steps, arguments.gap
    if steps % gap or steps < 2 * gap:
        parser.error(f"--steps {steps} must be a multiple of --gap {gap}, two or more.")
    options = (*demo.GALORE.options, f"update_proj_gap={gap}")  # the last one counts
    galore = dataclasses.replace(demo.GALORE, options=options, steps=steps)
    if arguments.part == "methods":
        found = compare_methods(galore, gap)
        print(tables.captured_energy(found))
        records.write(f"why/captured_energy_gap{gap}", found)
        return
    adamw = dataclasses.replace(demo.ADAMW, steps=steps)
    found = measure(galore, adamw, gap)
    print(tables.why_it_works(found))
    draw.draw(found)
    records.write("why/why_it_works", found)


if __name__ == "__main__":
    main()
