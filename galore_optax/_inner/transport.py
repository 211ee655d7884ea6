# SPDX-License-Identifier: Apache-2.0
"""The inner's moments in a new basis, array by array, whatever the inner is.

An array of its state belongs to the leaf whose path ends its own; a field of Optax'
names says whether it is a first moment or a second one. Coded moments are decoded for
one leaf at a time.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import GetAttrKey

from galore_optax import codes
from galore_optax._context import within
from galore_optax._inner.expected import check_state
from galore_optax._projector.project import turned, zero_coordinates
from galore_optax._projector.refresh import any_lane, by_leaf
from galore_optax._selection.leaves import by_end
from galore_optax._selection.matrices import Matrix, Plan
from galore_optax._storage.moments import MomentStorage, Path, is_coded, name
from galore_optax._storage.projectors import Projectors
from galore_optax._storage.quantized import MOMENTS
from galore_optax.moments import AtRefresh, Moment

# Fields of second moments, and of the first ones beside them.
_MEANS = {GetAttrKey("nu"): GetAttrKey("mu")}

Nodes = dict[Path, Any]


@dataclasses.dataclass(frozen=True)
class Transport:
    """What `rule` makes of the state of `inner`."""

    rule: AtRefresh
    inner: optax.GradientTransformation
    plan: Plan
    dtypes: Sequence[jnp.dtype]  # what the inner computes in, by leaf
    count: jax.Array  # steps taken

    def check(self, state: Any) -> None:
        """Raises unless `rule` can move every array of the projected leaves.

        Raises:
          ValueError: it cannot; the array is named.
        """
        nodes, _ = _nodes(state)
        storage = _begin(self.inner, self._zeros()).storage
        for number, paths in self._owned(nodes).items():
            matrix = self.plan.projected[number]
            for path in paths:
                self._check(matrix, path, _shape(nodes[path]), storage)
        if self.rule.turns:
            self._check_rates(state, storage)

    def _check_rates(self, state: Any, storage: MomentStorage) -> None:
        def rates(state: Any) -> list[jax.Array]:
            return list(self._rates(_nodes(state)[0], storage).values())

        try:
            jax.eval_shape(rates, state)
        except TypeError as error:
            raise ValueError(
                f"moments={self.rule!r} reads the decays off a step of the inner, which"
                f" failed ({error}). What needs extra arguments goes around galore:"
                " optax.chain(galore(...), optax.contrib.reduce_on_plateau(...))."
            ) from error

    def _check(
        self, matrix: Matrix, path: Path, shape: tuple[int, ...], storage: MomentStorage
    ) -> None:
        coordinates = shape == matrix.coordinate_shape
        if self.rule.turns and not (coordinates and storage.sign(path)):
            raise ValueError(
                f"moments={self.rule!r} cannot turn '{name(path)}' {shape} of the"
                " inner's state into a new basis: it knows first and second moments, of"
                f" the shape of the coordinates, {matrix.coordinate_shape}, under the"
                f" fields {', '.join(storage.moments)}. Use"
                " moments=galore_optax.moments.reset() or keep()."
            )
        if not coordinates and matrix.count > 1:
            raise ValueError(
                f"moments={self.rule!r} cannot tell which entries of '{name(path)}'"
                f" {shape} belong to which of the {matrix.count} matrices of"
                f" '{matrix.path}'. Use moments=galore_optax.moments.keep()."
            )

    def move(
        self,
        old: Sequence[Projectors],
        new: Sequence[Projectors],
        accepted: jax.Array,
        state: Any,
    ) -> Any:
        """`state`, its moments moved where a matrix took a new basis.

        Args:
          old: projectors, by leaf.
          new: likewise.
          accepted: (matrices,), bools.
          state: of the inner.
        """
        nodes, treedef = _nodes(state)
        begin = _begin(self.inner, self._zeros())
        check_state(begin.state, state)
        taken = by_leaf(self.plan, accepted, self.count)
        owned = self._owned(nodes)
        rates = self._rates(nodes, begin.storage) if self.rule.turns else {}
        for number, paths in owned.items():
            leaf = _Leaf(
                self.plan.projected[number],
                old[number],
                new[number],
                taken[number],
                self._ages(paths, rates),
            )
            found = self._moved(leaf, begin, {path: nodes[path] for path in paths})
            nodes.update(found)
        return treedef.unflatten(list(nodes.values()))

    def _moved(self, leaf: "_Leaf", begin: "_Begin", nodes: Nodes) -> Nodes:
        storage, paths = begin.storage, list(nodes)

        def turn(_: Any, stored: list[Any]) -> list[Any]:
            old = [_load(storage, *pair) for pair in zip(paths, stored, strict=True)]
            values = dict(zip(paths, old, strict=True))
            return [
                _store(storage, path, node, self._one(leaf, begin, path, values))
                for path, node in zip(paths, stored, strict=True)
            ]

        # What is decoded lives no longer than its leaf's turn.
        turns = any_lane(jnp.any(leaf.accepted)).astype(jnp.int32)
        moved = lax.fori_loop(0, turns, turn, list(nodes.values()))
        return dict(zip(paths, moved, strict=True))

    def _one(
        self, leaf: "_Leaf", begin: "_Begin", path: Path, values: Nodes
    ) -> jax.Array:
        value = values[path]
        aged = path in leaf.ages
        mean = leaf.ages[path] * values[_beside(path)] if aged else 0
        moment = Moment(
            value,
            begin.initial(path).astype(value.dtype),
            begin.storage.sign(path) == "signed",
            mean,
            functools.partial(leaf.turned, lambda q: q),
            functools.partial(leaf.turned, jnp.square),
        )
        return jnp.where(leaf.mask(value.ndim), self.rule.moved(moment), value)

    def _zeros(self) -> Any:
        """What `inner.init` was given, in shapes and dtypes."""
        leaves = zip(
            self.plan.matrices, self.plan.flat.values, self.dtypes, strict=True
        )
        zeros = [
            zero_coordinates(matrix, x, dtype) if matrix else jnp.zeros_like(x, dtype)
            for matrix, x, dtype in leaves
        ]
        return self.plan.flat.rebuild(zeros, self.plan.is_full)

    def _owned(self, nodes: Nodes) -> dict[int, list[Path]]:
        """Paths in the state, by the number of the projected leaf they belong to."""
        numbers = self.plan.arrange(range(len(self.plan.projected)))
        owners = dict(jax.tree_util.tree_flatten_with_path(numbers)[0])
        found: dict[int, list[Path]] = {}
        for path, node in nodes.items():
            owner = by_end(owners, path)
            if owner is not None and _size(node) > 1:
                found.setdefault(owner, []).append(path)
        return found

    def _rates(self, nodes: Nodes, storage: MomentStorage) -> dict[Path, jax.Array]:
        """What a step without a gradient leaves of one, for each moment.

        Read off an update of one entry a leaf, with the counters and hyper-parameters
        that the state has.
        """
        zeros = [
            jnp.zeros((1,) * ndim, d)
            for ndim, d in zip(self.plan.ndims, self.dtypes, strict=True)
        ]
        nothing = self.plan.flat.rebuild(zeros, self.plan.is_full)
        small, treedef = _nodes(self.inner.init(nothing))
        moments = {path for paths in self._owned(nodes).values() for path in paths}
        start = [
            _store(storage, path, x, jnp.ones(_shape(x), jnp.float32))
            if path in moments
            else (nodes[path] if _shape(nodes[path]) == _shape(x) else x)
            for path, x in small.items()
        ]
        left, _ = _nodes(self._after(nothing, treedef.unflatten(start)))
        return {
            path: jnp.ravel(_load(storage, path, left[path]))[0] for path in moments
        }

    def _after(self, nothing: Any, state: Any) -> Any:
        try:
            update = optax.with_extra_args_support(self.inner).update
            return update(nothing, state, nothing)[1]
        except jax.errors.UnexpectedTracerError as error:
            raise ValueError(
                f"moments={self.rule!r} needs the decays of the inner, which are traced"
                " hyper-parameters of what is around galore, where coordinates are made"
                " ahead of the update. Inject them inside: galore("
                "optax.inject_hyperparams(optax.adamw)(lr), moments=...)."
            ) from error

    def _ages(
        self, paths: Sequence[Path], rates: Mapping[Path, Any]
    ) -> dict[Path, Any]:
        """For each second moment what takes the mean beside it to its own bias."""
        found = {}
        for path in paths:
            if _beside(path) in rates:
                first, second = (
                    1 - rates[each] ** self.count for each in (_beside(path), path)
                )
                some = jnp.where(first > 0, first, 1)
                found[path] = jnp.where(first > 0, jnp.sqrt(second) / some, 0)
        return found


@dataclasses.dataclass(frozen=True)
class _Begin:
    """What `init` makes, and how moments are stored in it."""

    storage: MomentStorage
    state: Any

    @functools.cached_property
    def _nodes(self) -> Nodes:
        return _nodes(self.state)[0]

    def initial(self, path: Path) -> jax.Array:
        return _load(self.storage, path, self._nodes[path])


def _begin(inner: optax.GradientTransformation, params: Any) -> _Begin:
    storages: list[MomentStorage] = []
    with within(storages=storages):
        state = inner.init(params)
    if any(storage != storages[0] for storage in storages):
        raise ValueError(
            "the inner holds several `quantized`, with different codes: which of them"
            " stored a moment cannot be told from its state. Give them one code, or use"
            " moments=galore_optax.moments.keep()."
        )
    return _Begin((storages or [MomentStorage(codes.companded(), MOMENTS)])[0], state)


class _Leaf(NamedTuple):
    """The bases of one leaf, before and after."""

    matrix: Matrix
    old: Projectors
    new: Projectors
    accepted: jax.Array
    ages: dict[Path, Any]

    def mask(self, ndim: int) -> jax.Array:
        """`accepted`, to be broadcast over an array in coordinates."""
        if ndim != len(self.matrix.coordinate_shape):
            return jnp.reshape(self.accepted, (1,) * ndim)
        sizes = dict(zip(self._batch, self.matrix.batch_shape, strict=True))
        shape = [sizes.get(letter, 1) for letter in self.matrix.coordinate_letters]
        return self.accepted.reshape(shape)

    def turned(
        self, of: Callable[[jax.Array], jax.Array], value: jax.Array
    ) -> jax.Array:
        return turned(self.matrix, self.new, self.old, value, of)

    @property
    def _batch(self) -> str:
        return self.matrix.sides[0].project[: len(self.matrix.batch)]


def _beside(path: Path) -> Path:
    """Where the first moment lies that belongs to the second one at `path`."""
    fields = [i for i, key in enumerate(path) if key in _MEANS]
    if not fields:
        return ("no such place",)
    return (*path[: fields[-1]], _MEANS[path[fields[-1]]], *path[fields[-1] + 1 :])


def _nodes(state: Any) -> tuple[Nodes, Any]:
    pairs, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_coded)
    return dict(pairs), treedef


def _shape(node: Any) -> tuple[int, ...]:
    return tuple((node.codes if is_coded(node) else node).shape)


def _size(node: Any) -> int:
    return int((node.codes if is_coded(node) else node).size)


def _load(storage: MomentStorage, path: Path, node: Any) -> jax.Array:
    """The moment at `path`, f32 at least."""
    value = storage.load(path, node) if is_coded(node) else node
    return value.astype(jnp.promote_types(value.dtype, jnp.float32))


def _store(storage: MomentStorage, path: Path, old: Any, value: jax.Array) -> Any:
    """As `old` is stored."""
    if is_coded(old):
        return storage.store_as(old, path, value.astype(_wide(old)))
    return value.astype(old.dtype)


def _wide(stored: Any) -> jnp.dtype:
    narrow = not jnp.issubdtype(stored.codes.dtype, jnp.floating)
    return jnp.dtype(jnp.float32) if narrow else stored.codes.dtype
