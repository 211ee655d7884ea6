# SPDX-License-Identifier: Apache-2.0
"""Axes of a weight split and merged, and those of its addend with them."""

import math
from collections.abc import Sequence

import jax.numpy as jnp

from galore_optax.backward.addend import Addend, Term


def reshape(addend: Addend, old: Sequence[int], new: Sequence[int]) -> Addend | None:
    """The addend of a weight reshaped from `old` to `new`.

    `None` where axes are merged that no array of the addend has together, as a
    projected axis with one that is not.
    """
    if 0 in old:
        return None
    for letter, size in zip(addend.axes, old, strict=True):
        if size == 1:
            addend = addend.along(letter, jnp.squeeze, "")
    for letters, sizes in _groups(addend.axes, [n for n in old if n > 1], new):
        if len(letters) > 1 and not _can_merge(addend, letters):
            return None
        addend = _regrouped(addend, letters, sizes)
    for place, size in enumerate(new):
        if size == 1:
            addend = with_axis(addend, place, 1)
    return addend


def with_axis(addend: Addend, place: int, size: int) -> Addend:
    """A new axis of the weight, which repeats it.

    It goes to `Z`, whose cotangent then is the sum over it.
    """
    letter = addend.fresh(1)
    z = addend.variable.array()
    stored = jnp.broadcast_to(z[..., None], (*z.shape, size))
    variable = Term(stored, addend.variable.axes + letter)
    axes = addend.axes[:place] + letter + addend.axes[place:]
    return addend.with_terms((variable, *addend.bases), axes)


def _groups(
    axes: str, old: Sequence[int], new: Sequence[int]
) -> list[tuple[str, list[int]]]:
    """The shortest runs of old axes and of new sizes that hold the same entries."""
    groups = []
    sizes = iter([n for n in new if n > 1])
    letters, before, after = "", 1, [1]
    for letter, size in zip(axes, old, strict=True):
        letters, before = letters + letter, before * size
        while math.prod(after) < before:
            after.append(next(sizes))
        if math.prod(after) == before:
            groups.append((letters, after[1:]))
            letters, before, after = "", 1, [1]
    return groups


def _can_merge(addend: Addend, letters: str) -> bool:
    shared = [set(letters) & set(term.axes) for term in addend.terms]
    return all(len(found) in (0, len(letters)) for found in shared)


def _regrouped(addend: Addend, letters: str, sizes: list[int]) -> Addend:
    if len(letters) == len(sizes) == 1:
        return addend
    into = addend.fresh(len(sizes))
    terms = [_regroup(term, letters, into, sizes) for term in addend.terms]
    return addend.with_terms(terms, addend.axes.replace(letters, into))


def _regroup(term: Term, letters: str, into: str, sizes: list[int]) -> Term:
    if letters[0] not in term.axes:
        return term
    others = "".join(x for x in term.axes if x not in letters[1:])
    together = others.replace(letters[0], letters)
    array = jnp.transpose(term.array(), [term.axes.index(x) for x in together])
    at = together.index(letters)
    shape = (*array.shape[:at], *sizes, *array.shape[at + len(letters) :])
    return Term(array.reshape(shape), together.replace(letters, into))
