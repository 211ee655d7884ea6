# SPDX-License-Identifier: Apache-2.0
"""Counts what a compiled program is made of, from its optimized HLO as text.

    computations -> instructions -> those that run, and are no part of a fusion

Inside a fusion values live in registers; every other instruction that is no bookkeeping
is a kernel or a library call, and its result an array in memory.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator

_HEADER = re.compile(r"^(ENTRY )?%?([\w.$-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.$-]+) = (.+)$")
_OPCODE = re.compile(r"^(\(.*?\)|\S+) ([a-z][\w-]*)\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]+(?:e[0-9]m[0-9]\w*)?)\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# TPU's compiler writes no number of turns, but a condition that compares with one.
_CONDITION = re.compile(r"condition=%?([\w.$-]+)")
_CONSTANT = re.compile(r"\bs32\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r" compare\(%?[\w.$-]+, %?([\w.$-]+)\), direction=LT")
# What another computation is run by. A fusion's is not run, but compiled into it.
_CALLED = re.compile(
    r"(?:body|condition|true_computation|false_computation|to_apply|calls)"
    r"=%?([\w.$-]+)|branch_computations=\{([^}]*)\}"
)
_BOOKKEEPING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("while", "conditional", "call", "opt-barrier", "partition-id", "replica-id"),
    *("async-done", "copy-done", "custom-call-done", "iota"),
}
_RUNS = ("while", "conditional", "call", "async-start")
Shape = tuple[int, ...]
PRODUCTS = ("__cublas", "__cudnn", "__triton_gemm", "__triton_nested_gemm")


@dataclasses.dataclass(frozen=True)
class Array:
    """What an instruction writes, or one part of it."""

    dtype: str
    shape: Shape

    def is_like(self, shapes: Iterable[Shape]) -> bool:
        """Whether it is an array of one of `shapes`, transposed or with axes merged.

        One with more axes is another: partial sums of a product that was split may
        have as many entries by accident.
        """
        axes = sum(size > 1 for size in self.shape)
        size = math.prod(self.shape)
        return any(size == math.prod(x) and axes <= len(x) for x in shapes)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    text: str

    @property
    def is_kernel(self) -> bool:
        return self.opcode not in _BOOKKEEPING

    @property
    def is_product(self) -> bool:
        return self.opcode == "dot" or any(word in self.text for word in PRODUCTS)

    @property
    def trips(self) -> int | None:
        """Turns of a loop, where the compiler knows them."""
        found = _TRIPS.search(self.text)
        return int(found[1]) if found else None

    def fuses(self) -> list[str]:
        return _CALLED.findall(self.text)[0][:1] if self.opcode == "fusion" else []

    def called(self) -> list[str]:
        if self.opcode not in _RUNS:
            return []
        names = []
        for one, many in _CALLED.findall(self.text):
            names += [one] if one else [x.strip(" %") for x in many.split(",")]
        return names


@dataclasses.dataclass(frozen=True)
class Loop:
    """A `while`; where the compiler cannot count its turns, each asks the host."""

    depth: int  # loops around it
    trips: int | None  # None: known on the device alone
    kernels: int  # that a turn writes, those of loops inside it once


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations that run, by name."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str
    fused: dict[str, tuple[Instruction, ...]]  # those that are parts of fusions

    @classmethod
    def parse(cls, text: str) -> "Program":
        every, entry = _computations(text)
        found, wanted = {}, [entry]
        while wanted:
            name = wanted.pop()
            if name not in found:
                found[name] = every[name]
                wanted += [called for line in every[name] for called in line.called()]
        fused = {name: lines for name, lines in every.items() if name not in found}
        return cls(found, entry, fused)

    def __iter__(self) -> Iterator[Instruction]:
        return (line for lines in self.computations.values() for line in lines)

    def count(self, opcode: str) -> int:
        return sum(line.opcode == opcode for line in self)

    def arrays(self, dtype: str, shapes: Iterable[Shape]) -> list[Instruction]:
        """Kernels that write an array of `dtype` like one of `shapes`."""
        wanted = tuple(shapes)
        return [
            line
            for line in self
            if line.is_kernel
            and any(x.dtype == dtype and x.is_like(wanted) for x in line.arrays)
        ]

    def loops(self) -> list["Loop"]:
        """Every loop, the outer ones before those inside them."""
        return list(self._loops(self.entry, 0))

    def _loops(self, name: str, depth: int) -> Iterator["Loop"]:
        for line in self.computations[name]:
            inside = line.opcode == "while"
            if inside:
                kernels = sum(x.is_kernel for x in self.within(line))
                yield Loop(depth, line.trips, kernels)
            for called in line.called():
                yield from self._loops(called, depth + inside)

    def runs(self) -> Iterator[tuple[Instruction, float]]:
        """Every instruction, those inside fusions too, and how often it runs.

        As far as is known: a loop whose turns are not counts once, and of the branches
        of a conditional each as often as the others.
        """
        yield from self._runs(self.entry, 1.0)

    def _runs(self, name: str, times: float) -> Iterator[tuple[Instruction, float]]:
        for line in self.computations.get(name) or self.fused[name]:
            yield line, times
            called = line.called() or line.fuses()
            share = len(called) if line.opcode == "conditional" else 1
            turns = (line.trips or self._bound(line)) if line.opcode == "while" else 1
            for inner in called:
                yield from self._runs(inner, times * (turns or 1) / share)

    def _bound(self, loop: Instruction) -> int | None:
        """Up to which constant a loop counts, by its condition; JAX counts from 0."""
        condition = self.computations[_CONDITION.search(loop.text)[1]]
        known = {x.name: m[1] for x in condition if (m := _CONSTANT.search(x.text))}
        found = _LESS.search(condition[-1].text)
        return int(known[found[1]]) if found and found[1] in known else None

    def within(self, line: Instruction) -> Iterator[Instruction]:
        """What runs on behalf of `line`, loops inside it once."""
        for called in line.called():
            for inner in self.computations[called]:
                yield inner
                yield from self.within(inner)


def _computations(text: str) -> tuple[dict[str, tuple[Instruction, ...]], str]:
    """All of a module's, and which of them it enters by."""
    found: dict[str, list[Instruction]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if header := _HEADER.match(line):
            lines = found.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif match := _LINE.match(line):
            lines.append(_instruction(match[1], match[2]))
    return {name: tuple(lines) for name, lines in found.items()}, entry


def _instruction(name: str, text: str) -> Instruction:
    match = _OPCODE.match(text)
    kind, opcode = (match[1], match[2]) if match else (text, "unknown")
    shapes = _SHAPE.findall(kind)
    arrays = (Array(d, tuple(map(int, filter(None, s.split(","))))) for d, s in shapes)
    return Instruction(name, opcode, tuple(arrays), text)
