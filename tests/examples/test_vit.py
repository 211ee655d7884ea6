# SPDX-License-Identifier: Apache-2.0
"""The vision transformer: its images, what is projected, a run."""

import gzip
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import galore_optax as go

import classify
import images
from classify import Run
from vit import ViT


def idx(array: np.ndarray) -> bytes:
    sizes = np.array(array.shape, ">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def digits(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright patch, of the four by four there are, says which class it is."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count).astype(np.uint8)
    pictures = rng.integers(0, 60, (count, 28, 28)).astype(np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        row, column = 7 * (label // 4), 7 * (label % 4)
        picture[row : row + 7, column : column + 7] = 255
    return pictures, labels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, (name, count) in enumerate((("train", 256), ("t10k", 70))):
        pictures, labels = digits(count, seed)
        (tmp_path / f"{name}-images-idx3-ubyte").write_bytes(idx(pictures))
        packed = gzip.compress(idx(labels))
        (tmp_path / f"{name}-labels-idx1-ubyte.gz").write_bytes(packed)
    return tmp_path


def test_images_are_read_and_each_is_shown_once(folder: Path) -> None:
    training, test = images.load(folder, folder)
    pictures, labels = digits(256, 0)
    np.testing.assert_array_equal(training.images[..., 0], pictures)
    np.testing.assert_array_equal(training.labels, labels)
    shown = [y for _, y in training.epoch(32, seed=3)]
    assert len(shown) == 8
    assert sorted(np.concatenate(shown)) == sorted(labels)
    assert list(np.concatenate(shown)) != list(labels)
    sizes = [len(y) for _, y in test.in_order(32)]
    assert sizes == [32, 32, 6]
    x, _ = next(training.epoch(32, seed=0))
    assert (x.shape, x.dtype, x.max()) == ((32, 28, 28, 1), np.float32, 1.0)


def test_what_is_wrong_with_images_is_named(folder: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=r"no train-images.*has nothing\. Give"):
        images.load(empty, tmp_path)
    target = folder / "train-images-idx3-ubyte"
    content = target.read_bytes()
    for wrong in (content[:-5], b"GIF89a", content[:3]):
        target.write_bytes(wrong)
        with pytest.raises(
            ValueError, match=r"train-images-idx3-ubyte is no such file"
        ):
            images.load(folder, tmp_path)
    target.write_bytes(idx(digits(200, 0)[0]))
    with pytest.raises(ValueError, match="200 images and 256 labels"):
        images.load(folder, tmp_path)


def test_the_patch_kernel_is_projected_and_the_stem_is_not() -> None:
    model = nnx.eval_shape(lambda: ViT(16, 1, 2, nnx.Rngs(0)))
    tx = Run(width=16, heads=2).transformation(20)
    report = {x.path: x for x in go.describe(tx, nnx.state(model, nnx.Param))}
    assert report["patch/kernel"].matrix == "16x392"  # outputs x windows and inputs
    assert report["patch/kernel"].rank == 4
    whole = {path for path, leaf in report.items() if not leaf.rank}
    assert {"stem_conv/kernel", "position", "head/kernel"} <= whole
    assert not any("warning" in line for line in str(report).splitlines())


@pytest.mark.slow
def test_a_run_learns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape: Any = {"width": 16, "depth": 1, "heads": 2, "batch": 8, "epochs": 3}
    run = Run(images=folder, gap=10, learning_rate=0.02, **shape)
    found = classify.train(run)
    assert found["loss"][-1] < 0.75 * found["loss"][0]
    assert found["accuracy"][-1] > 0.3  # by chance a tenth
    model = nnx.eval_shape(lambda: ViT(16, 1, 2, nnx.Rngs(0)))
    adamw = Run("adamw").transformation(10)
    whole = jax.eval_shape(adamw.init, nnx.state(model, nnx.Param))
    usual = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(whole))
    assert found["state_bytes"] < 0.6 * usual
    assert "patch/kernel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora"}, "unknown method='lora'; known: galore, adamw"),
        ({"width": 20, "heads": 4}, "width=20 must be a multiple of twice heads=4"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(**changes)


def test_ranks_and_batches_out_of_range(folder: Path) -> None:
    with pytest.raises(ValueError, match="256 images make no batch of 300"):
        classify.train(Run(images=folder, batch=300))
    with pytest.raises(ValueError, match=r"rank=-0\.5 must be"):
        Run(rank=-0.5).transformation(10)
    whole = nnx.state(nnx.eval_shape(lambda: ViT(16, 1, 2, nnx.Rngs(0))), nnx.Param)
    with pytest.warns(UserWarning, match="the rank reaches a dimension"):
        jax.eval_shape(Run(rank=16).transformation(10).init, whole)
