# SPDX-License-Identifier: Apache-2.0
"""A model in one GGUF file, llama.cpp's format: facts, tokenizer and weights.

    magic, version, counts | fields | names, shapes, kinds, offsets | tensors

Weights of few bits become f32, a block of 32 along the last axis at once:

    Q8_0    x = d · q         q of 8 bits, d in f16
    Q4_1    x = d · q + m     q of 4 bits, d and m in f16
"""

import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

_BLOCK = 32
_STRING, _ARRAY = 8, 9
_SCALARS = "BbHhIif?--Qqd"  # of struct, by the number of a field's type
_HALF = np.dtype("<f2")


class Gguf(NamedTuple):
    """What a file holds."""

    fields: dict[str, Any]
    tensors: dict[str, np.ndarray]  # f32, axes as in PyTorch


def read(content: bytes) -> Gguf:
    """The fields and tensors of a file of version 2 or 3.

    Raises:
      ValueError: it is none, or a tensor is kept in a way that is not known here.
    """
    if content[:4] != b"GGUF":
        raise ValueError(f"no GGUF file: it begins with {content[:4]!r}.")
    cursor = _Cursor(content, 4)
    _, count, pairs = cursor.take("I"), cursor.take("Q"), cursor.take("Q")
    fields = {cursor.string(): cursor.value(cursor.take("I")) for _ in range(pairs)}
    infos = [_Info.read(cursor) for _ in range(count)]
    alignment = fields.get("general.alignment", _BLOCK)
    start = -(-cursor.at // alignment) * alignment
    return Gguf(fields, {i.name: i.tensor(content, start) for i in infos})


class _Cursor:
    """Reads one thing after the other."""

    def __init__(self, content: bytes, at: int):
        self.content, self.at = content, at

    def take(self, kind: str) -> Any:
        (found,) = struct.unpack_from(f"<{kind}", self.content, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return found

    def string(self) -> str:
        length = self.take("Q")
        self.at += length
        return self.content[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, length = self.take("I"), self.take("Q")
            return [self.value(inner) for _ in range(length)]
        return self.take(_SCALARS[kind])


class _Info(NamedTuple):
    """Where a tensor is, and how it is kept."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @classmethod
    def read(cls, cursor: _Cursor) -> "_Info":
        name, axes = cursor.string(), cursor.take("I")
        shape = tuple(cursor.take("Q") for _ in range(axes))[::-1]
        return cls(name, shape, cursor.take("I"), cursor.take("Q"))

    def tensor(self, content: bytes, start: int) -> np.ndarray:
        if self.kind not in _KINDS:
            raise ValueError(
                f"tensor '{self.name}' is kept in GGUF's way number {self.kind}; known:"
                f" {', '.join(map(str, _KINDS))} (F32, Q4_1, Q8_0)."
            )
        size, of_bytes, decode = _KINDS[self.kind]
        blocks = int(np.prod(self.shape)) // size
        at = start + self.offset
        raw = np.frombuffer(content, np.uint8, blocks * of_bytes, at)
        return decode(raw.reshape(blocks, of_bytes)).reshape(self.shape)


def _f32(raw: np.ndarray) -> np.ndarray:
    return raw.view("<f4").astype(np.float32)


def _q8_0(raw: np.ndarray) -> np.ndarray:
    scale = raw[:, :2].view(_HALF).astype(np.float32)  # (blocks, 1)
    return scale * raw[:, 2:].view(np.int8)


def _q4_1(raw: np.ndarray) -> np.ndarray:
    scale, least = np.split(raw[:, :4].view(_HALF).astype(np.float32), 2, axis=1)
    numbers = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1)
    return scale * numbers + least


# By number: entries a block, bytes a block, how it is decoded.
_KINDS: dict[int, tuple[int, int, Callable[[np.ndarray], np.ndarray]]] = {
    0: (1, 4, _f32),
    3: (_BLOCK, 20, _q4_1),
    8: (_BLOCK, 34, _q8_0),
}
