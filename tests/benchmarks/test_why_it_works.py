# SPDX-License-Identifier: Apache-2.0
"""Ranks, overlaps, what is put on record, and pictures from the record alone."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.lib import pictures
from benchmarks.why import draw, spectra, why_it_works
from galore_optax.memory import config_path
from tests.helpers import with_spectrum

import data
import demo
from train import Text

# name: singular values, and numerical, effective and stable rank
KNOWN: dict[str, tuple[list[float], tuple[float, float, float]]] = {
    "one direction": ([3, 0, 0], (1, 1, 1)),
    "equal": ([2, 2, 2, 2], (4, 4, 4)),
    "equal and nothing": ([5, 5, 0, 0], (2, 2, 2)),
    "halves": ([2, 1, 1], (3, 2**1.5, 1.5)),
    "the threshold is not above itself": ([1, 0.02, 0.01, 0], (2, math.nan, 1.0005)),
    "nothing": ([0, 0], (0, 0, 0)),
}


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("size", [1.0, 1e-20, 1e20])
def test_ranks_of_known_spectra(name: str, size: float) -> None:
    values, expected = KNOWN[name]
    found = [rank(size * np.array(values)) for rank in spectra.RANKS.values()]
    for one, other in zip(found, expected, strict=True):
        assert math.isnan(other) or one == pytest.approx(other, rel=1e-12)


def test_singular_values_are_those_of_every_matrix() -> None:
    expected = [[5.0, 2.0, 0.5], [1.0, 1.0, 1e-3]]
    stack = np.array([with_spectrum(i, (6, 3), x) for i, x in enumerate(expected)])
    found = spectra.singular_values(stack)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-13 * 5)
    np.testing.assert_allclose(spectra.numerical_rank(found), [3, 2])


def basis(seed: int, rows: int, rank: int) -> np.ndarray:
    normal = np.random.default_rng(seed).normal(size=(rows, rank))
    return np.linalg.qr(normal)[0]


def test_overlap_of_one_span_is_one_whatever_its_basis() -> None:
    one, turn = basis(0, 12, 4), basis(1, 4, 4)
    assert spectra.overlap(one, one @ turn) == pytest.approx(1, abs=1e-14)


def test_overlap_is_the_mean_squared_cosine() -> None:
    angles, eye = np.array([0.3, 1.1]), np.eye(6)
    tilted = np.cos(angles) * eye[:, :2] + np.sin(angles) * eye[:, 2:4]
    expected = np.mean(np.cos(angles) ** 2)
    assert spectra.overlap(eye[:, :2], tilted) == pytest.approx(expected, abs=1e-15)
    assert spectra.overlap(eye[:, :2], eye[:, 4:]) == 0


def test_overlap_does_not_see_coordinates_or_order() -> None:
    one, other, turn = basis(0, 9, 3), basis(1, 9, 3), basis(2, 9, 9)
    found = spectra.overlap(one, other)
    assert spectra.overlap(turn @ one, turn @ other) == pytest.approx(found, abs=1e-14)
    assert spectra.overlap(other, one) == pytest.approx(found, abs=1e-14)


def test_random_subspaces_share_rank_over_rows() -> None:
    rows, rank, count = 16, 4, 400
    pairs = [[basis(2 * i + k, rows, rank) for i in range(count)] for k in (0, 1)]
    found = spectra.overlap(*np.array(pairs))
    assert np.all((found >= 0) & (found <= 1))
    error = 5 * np.std(found) / math.sqrt(count)  # five standard errors
    assert np.mean(found) == pytest.approx(rank / rows, abs=error)


LAYERS, ROWS, COLS = 2, 96, 128
PATHS = [f"layers/{name}/kernel" for name in ("attn/q", "mlp/up")]


def probe(seed: int, weights: dict[str, np.ndarray]) -> why_it_works.Probe:
    rng = np.random.default_rng(seed)

    def bases(seed: int) -> dict[str, np.ndarray]:
        stack = [basis(seed + layer, ROWS, demo.RANK) for layer in range(LAYERS)]
        return dict.fromkeys(PATHS, np.array(stack))

    def shares() -> dict[str, np.ndarray]:
        return {path: rng.uniform(size=LAYERS) for path in PATHS}

    values = np.sort(rng.uniform(0.1, 1, (LAYERS, ROWS)))[:, ::-1]
    return why_it_works.Probe(
        spectrum=dict.fromkeys(PATHS, values),
        basis=bases(seed),
        other_basis=bases(seed + 50),
        energy={name: shares() for name in why_it_works.ENERGIES},
        weights=weights,
    )


def path_of_weights(stops: int, rank: int) -> list[dict[str, np.ndarray]]:
    """Weights that move in another subspace of `rank` dimensions at every stop."""
    rng = np.random.default_rng(0)
    moves = rng.normal(size=(stops, LAYERS, ROWS, rank)) @ rng.normal(
        size=(stops, LAYERS, rank, COLS)
    )
    start = rng.normal(size=(1, LAYERS, ROWS, COLS))
    weights = np.concatenate([start, start + np.cumsum(moves, axis=0)])
    return [dict.fromkeys(PATHS, x) for x in weights]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """A record as `measure` makes it, through JSON."""
    weights = path_of_weights(3, 10)
    probes = [probe(100 * i, x) for i, x in enumerate(weights)]
    update = why_it_works.update_of(weights)
    galore, adamw = demo.GALORE, demo.ADAMW
    record = {
        "setting": why_it_works.setting_of(galore, adamw, 50),
        "steps": [0, 50, 100, 150],
        "spectrum": why_it_works.spectrum_of(probes),
        "overlap": why_it_works.overlap_of(probes),
        "energy": why_it_works.energy_of(probes),
        "update": {"GaLore": update, "AdamW": update},
    }
    return json.loads(json.dumps(record))


def test_update_rank_grows_by_a_subspace_at_a_time(found: dict[str, Any]) -> None:
    ranks = found["update"]["GaLore"]["ranks"]["numerical rank"]
    assert ranks == {"attn/q": [[10, 10], [20, 20], [30, 30]]} | {
        "mlp/up": [[10, 10], [20, 20], [30, 30]]
    }


def test_what_is_on_record(found: dict[str, Any]) -> None:
    index = found["spectrum"]["index"]
    assert index[0] == 1
    assert demo.RANK in index
    assert index[-1] == ROWS
    overlap = found["overlap"]
    assert np.shape(overlap["successive"]["attn/q"]) == (3, LAYERS)
    assert np.shape(overlap["same_weights_next_batch"]["mlp/up"]) == (4, LAYERS)
    np.testing.assert_allclose(np.diag(overlap["every_two"]), 1, atol=1e-4)
    np.testing.assert_array_equal(
        overlap["every_two"], np.transpose(overlap["every_two"])
    )
    assert overlap["random"]["attn/q"] == pytest.approx(demo.RANK / ROWS, rel=1e-3)
    stops = {name: len(x["attn/q"]) for name, x in found["energy"].items()}
    assert stops == {why_it_works.OWN: 4, why_it_works.OTHER: 4, why_it_works.OLD: 3}


def test_pictures_come_from_the_record_alone(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "IMAGES", tmp_path / "docs" / "images")
    draw.draw(found)
    names = {"spectrum.png", "overlap.png", "energy.png", "update_rank.png"}
    assert {path.name for path in pictures.IMAGES.iterdir()} == names


@pytest.mark.slow
def test_probes_are_of_the_run_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads(config_path("demo").read_text()) | TINY
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    options = (*demo.GALORE.options, "rank=8", "update_proj_gap=2")
    run = dataclasses.replace(
        demo.GALORE, model=str(tmp_path / "tiny.json"), options=options, steps=4
    )
    stream = np.random.default_rng(0).integers(0, 64, 9000).astype(np.uint16)
    corpus = data.Corpus(stream, stream, None)  # type: ignore[arg-type]
    monkeypatch.setattr(
        why_it_works, "open_text", lambda _: Text(corpus.batches(128, 8, 0), [])
    )
    program = run.program()
    prober = why_it_works.Prober(program)
    before, weights = None, []
    for stop in why_it_works.stops(run, program, 2):
        if before:  # what the run has used since the last stop is what was found there
            used = why_it_works.projectors(stop.state.opt_state)
            for path, bases in before.basis.items():
                found = spectra.overlap(bases, used[path])
                np.testing.assert_allclose(found, 1, atol=1e-5)
        before = prober(stop)
        weights.append(before.weights)
        for path, values in before.spectrum.items():
            best = np.sum(values[:, :8] ** 2, 1) / np.sum(values**2, 1)
            own = before.energy[why_it_works.OWN][path]
            assert np.all(own < best + 1e-5)
            assert np.all(own > 0.95 * best)
            assert np.all(own > before.energy[why_it_works.OTHER][path])
    ranks = why_it_works.update_of(weights)["ranks"]["numerical rank"]
    # Weight decay is of full rank, and far below one per cent of the rest.
    assert all(max(rows[0]) <= 8 < max(rows[1]) for rows in ranks.values())


TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def test_rounding_keeps_four_digits() -> None:
    found = why_it_works.rounded(np.array([[0.123456, 12345.6], [0.0, 1e-7 / 3]]))
    assert found == [[0.1235, 12350.0], [0.0, 3.333e-08]]


def test_only_whole_gaps_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv", ["why_it_works.py", "pictures", "--steps", "120", "--gap", "50"]
    )
    with pytest.raises(SystemExit):
        why_it_works.main()
