# SPDX-License-Identifier: Apache-2.0
"""The projected leaves of a transformation, each with what its addend is made of."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from galore_optax._asking.record import Recorded, galore_states, heard, is_state
from galore_optax._projector.coordinates import project_gradients
from galore_optax._projector.refresh import When, any_lane, owed_now
from galore_optax._selection.leaves import flatten
from galore_optax._selection.matrices import Matrix
from galore_optax._state import read
from galore_optax._storage.projectors import Floating, Projector
from galore_optax._xla.sharding import everywhere, explicit_sharding, place
from galore_optax.backward.addend import Addend, Factored, Term
from galore_optax.backward.coding import Coding


@dataclasses.dataclass(frozen=True)
class Weights:
    """The leaves of params, and what addends those that are projected get."""

    values: list[Any]
    paths: tuple[str, ...]
    structure: Any  # of params
    low: Any  # shapes of what `project_gradients` returns
    addends: list[Addend | None]  # with no array for `Z` yet
    records: tuple[Recorded, ...]  # of every `galore`

    def with_bases(self, state: Any) -> "Weights":
        """The same with the bases in another `state`."""
        addends = _addends(self.records, state, self.paths)
        return dataclasses.replace(self, addends=addends)

    def named(self) -> "Weights":
        """With addends that say whose they are."""
        addends = [
            addend and dataclasses.replace(addend, leaf=path)
            for addend, path in zip(self.addends, self.paths, strict=True)
        ]
        return dataclasses.replace(self, addends=addends)

    def beside(self, others: Any) -> "Weights":
        """With the leaves of another tree, which have no addends; trees are pairs."""
        leaves = jax.tree.leaves(others)
        return dataclasses.replace(
            self,
            values=[*self.values, *leaves],
            paths=(*self.paths, *("" for _ in leaves)),
            structure=jax.tree.structure((self.tree(self.values), others)),
            low=(self.low, others),
            addends=[*self.addends, *(None for _ in leaves)],
        )

    def tree(self, leaves: Sequence[Any]) -> Any:
        return jax.tree.unflatten(self.structure, leaves)

    def variables(self) -> list[Any]:
        """What is differentiated: zeros in coordinates, or the leaf itself."""
        low = jax.tree.leaves(self.low)
        return [
            value if addend is None else _zeros(x, value.dtype)
            for value, addend, x in zip(self.values, self.addends, low, strict=True)
        ]

    def inputs(self, variables: Sequence[Any]) -> list[Any]:
        """The leaves, projected ones with their addends."""
        return [
            variable if addend is None else Factored(value, addend.at(variable))
            for value, addend, variable in zip(
                self.values, self.addends, variables, strict=True
            )
        ]

    def gradients(self, of_variables: Sequence[Any]) -> Any:
        """The tree that `project_gradients` returns."""
        return jax.tree.unflatten(jax.tree.structure(self.low), of_variables)


def weights_of(tx: optax.GradientTransformation, state: Any, params: Any) -> Weights:
    """The leaves of `params` with the bases in `state`.

    Raises:
      TypeError: a leaf has no gradient.
      ValueError: where `project_gradients` does.
    """
    flat = flatten(params)
    for path, value in flat.items():
        _check_differentiable(path, value)
    project = functools.partial(project_gradients, tx, refresh=False)
    low, _ = jax.eval_shape(project, params, state, params)
    values, structure = jax.tree.flatten(params)
    records, _ = heard(tx, params)
    addends = _addends(records, state, flat.paths)
    return Weights(values, flat.paths, structure, low, addends, records)


def _check_differentiable(path: str, value: Any) -> None:
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        raise TypeError(
            f"'{path}' is {value.dtype}, and has no gradient. Keep it out of params:"
            " give it to the loss in another argument."
        )


def _zeros(x: Any, dtype: jnp.dtype) -> jax.Array:
    return place(jnp.zeros(x.shape, dtype), explicit_sharding(x))


def _addends(
    records: tuple[Recorded, ...], state: Any, paths: Sequence[str]
) -> list[Addend | None]:
    states = galore_states(records, state)
    found = {
        matrix.path: _addend(matrix, projectors)
        for record, part in zip(records, states, strict=True)
        for matrix, projectors in zip(
            record.plan.projected, everywhere(read(record.plan, part)), strict=True
        )
    }
    return list(map(found.get, paths))


def _addend(matrix: Matrix, projectors: tuple[Projector, ...]) -> Addend:
    bases = []
    for side, projector in zip(matrix.sides, projectors, strict=True):
        coding = None
        if not isinstance(matrix.storage, Floating):
            shape = matrix.projector_shape(side)
            coding = Coding(matrix.storage, shape, len(matrix.batch))
        axes = side.project.split(",")[0]
        bases.append(Term(projector, axes, coding))
    variable = Term(None, matrix.coordinate_letters)
    return Addend(variable, tuple(bases), matrix.leaf_letters)


def moves_moments(records: tuple[Recorded, ...]) -> bool:
    """Whether a refresh changes more than bases."""
    return any(record.config.moments.moves for record in records)


def is_due(records: tuple[Recorded, ...], state: Any, when: When) -> jax.Array:
    """Whether any matrix is to be renewed now, in any lane of a `vmap`."""
    owed = [
        jnp.any(owed_now(record.plan, record.config.stagger, x.refresh, x.count, when))
        for record, x in zip(records, galore_states(records, state), strict=True)
        if record.plan.projected
    ]
    return any_lane(jnp.any(jnp.stack(owed)))


def bases_of(state: Any, *, moments: bool) -> list[Any]:
    """What a refresh changes of `state`; whether moments are among it."""
    nodes = jax.tree.leaves(state, is_leaf=is_state)
    return [
        (node.projector, node.refresh, node.inner_state if moments else ())
        for node in nodes
        if is_state(node)
    ]


def with_bases(state: Any, bases: list[Any], *, moments: bool) -> Any:
    """`state` with other bases, of the same structure as `bases_of(state)`."""
    found = iter(bases)

    def replaced(node: Any) -> Any:
        if not is_state(node):
            return node
        projector, refresh, moved = next(found)
        inner_state = moved if moments else node.inner_state
        return node._replace(
            projector=projector, refresh=refresh, inner_state=inner_state
        )

    return jax.tree.map(replaced, state, is_leaf=is_state)
