# SPDX-License-Identifier: Apache-2.0
"""A weight with a zero addend, `W + P Z`: what is differentiated in place of `W`.

The derivative with respect to `Z` at zero is `PᵀG`. Letters name axes, as in `einsum`:
an axis of the weight has its letter in each array that runs over it, and the addend is
`einsum("Z,P->W")` whatever becomes of the weight on its way to a product.
"""

import dataclasses
import functools
import string
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from galore_optax._xla.sharding import (
    Names,
    explicit_sharding,
    made_of,
    names_of,
    place,
)
from galore_optax.backward.coding import Coding

# (array, position of an axis) -> the array with that axis changed
Change: TypeAlias = Callable[[Any, int], Any]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["stored"],
    meta_fields=["axes", "coding"],
)
@dataclasses.dataclass(frozen=True)
class Term:
    """An array of an addend, or what stores it, and the letters of its axes."""

    stored: Any  # the array, or a pytree that `coding` decodes
    axes: str
    coding: Coding | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.coding.shape if self.coding else self.stored.shape

    def array(self, dtype: Any = None) -> jax.Array:
        """As an array, in `dtype`; in its own if that is `None`."""
        if self.coding is not None:
            return self.coding.decode(self.stored, dtype or jnp.float32)
        return self.stored if dtype is None else self.stored.astype(dtype)

    def decoded(self) -> "Term":
        return self if self.coding is None else Term(self.array(), self.axes)

    def along(self, letter: str, change: Change, into: str) -> "Term":
        """With the axis `letter` changed into the axes `into`."""
        if letter not in self.axes:
            return self
        at = self.axes.index(letter)
        axes = self.axes[:at] + into + self.axes[at + 1 :]
        if self.coding is None:
            return Term(change(self.stored, at), axes)
        if into or not self.coding.is_batch(at):
            return self.decoded().along(letter, change, into)
        stored = jax.tree.map(lambda x: change(x, at), self.stored)
        return Term(stored, axes, self.coding.without(at))

    def led_by(self, letter: str) -> "Term":
        """With the axis `letter` first."""
        at = self.axes.index(letter)
        if self.coding is not None and (at or not self.coding.is_batch(at)):
            return self.decoded().led_by(letter)
        stored = jax.tree.map(lambda x: jnp.moveaxis(x, at, 0), self.stored)
        return dataclasses.replace(
            self, stored=stored, axes=letter + self.axes.replace(letter, "")
        )

    def lying(self, names: Mapping[str, Names]) -> "Term":
        """With these batch axes split over these axes of an Explicit mesh."""
        at = {self.axes.index(letter): found for letter, found in names.items()}
        if self.coding is not None and not all(map(self.coding.is_batch, at)):
            return self.decoded().lying(names)

        def one(x: jax.Array) -> jax.Array:
            sharding = explicit_sharding(x)
            if sharding is None:
                return x
            before = enumerate(names_of(sharding, x.ndim))
            after = [at.get(axis, found) for axis, found in before]
            return place(x, made_of(sharding.mesh, after))

        return self.holding(jax.tree.map(one, self.stored))

    def holding(self, stored: Any) -> "Term":
        return dataclasses.replace(self, stored=stored)

    def entry(self, stored: Any) -> "Term":
        """One entry of the first axis, `stored`."""
        coding = self.coding and self.coding.without(0)
        return Term(stored, self.axes[1:], coding)

    def stacked(self, letter: str) -> "Term":
        """With a new first axis, which `stored` has already."""
        return dataclasses.replace(self, axes=letter + self.axes)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["variable", "bases"],
    meta_fields=["axes", "leaf"],
)
@dataclasses.dataclass(frozen=True)
class Addend:
    """`P Z`, or `P₁ Z P₂ᵀ`, with axes like the weight's."""

    variable: Term  # Z, zero
    bases: tuple[Term, ...]
    axes: str  # of the weight
    leaf: str = ""  # its path, for `explain`

    @property
    def terms(self) -> tuple[Term, ...]:
        return (self.variable, *self.bases)

    def at(self, z: Any) -> "Addend":
        """With the array `z`."""
        return dataclasses.replace(self, variable=self.variable.holding(z))

    def with_terms(self, terms: Iterable[Any], axes: str) -> "Addend":
        variable, *bases = terms
        return Addend(variable, tuple(bases), axes, self.leaf)

    def along(self, letter: str, change: Change, into: str) -> "Addend":
        """With the weight's axis `letter` changed into the axes `into`."""
        terms = [term.along(letter, change, into) for term in self.terms]
        return self.with_terms(terms, self.axes.replace(letter, into))

    def transposed(self, axes: Iterable[int]) -> "Addend":
        letters = "".join(self.axes[axis] for axis in axes)
        return dataclasses.replace(self, axes=letters)

    def projected(self, basis: Term) -> str:
        """The weight's axes that `basis` projects."""
        return "".join(
            x for x in basis.axes if x in self.axes and x not in self.variable.axes
        )

    def fresh(self, count: int, taken: str = "") -> str:
        """So many letters that no axis has."""
        used = set(taken).union(self.axes, *(term.axes for term in self.terms))
        return "".join(x for x in string.ascii_letters if x not in used)[:count]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "addend"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Factored:
    """A value of the program that is linear in a projected parameter."""

    weight: Any  # as the program has it; no gradient goes through it
    addend: Addend

    def decoded(self) -> "Factored":
        terms = [term.decoded() for term in self.addend.terms]
        return Factored(self.weight, self.addend.with_terms(terms, self.addend.axes))
