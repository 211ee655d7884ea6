# SPDX-License-Identifier: Apache-2.0
"""The state of one transformation as that of another, in the middle of a run.

projectors     decode -> keep the leading columns, or add orthonormal ones -> encode
moments        decode -> keep the leading entries, or add some             -> encode
all the rest   as it is
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, SequenceKey

from galore_optax import codes
from galore_optax._asking.held import Keys, unboxed
from galore_optax._asking.record import Recorded, galore_states, is_state, plans_of
from galore_optax._context import within
from galore_optax._projector.project import accumulation_dtype
from galore_optax._selection.leaves import by_end
from galore_optax._selection.matrices import Matrix, few
from galore_optax._storage.moments import MomentStorage, is_coded, name
from galore_optax._storage.projectors import Floating
from galore_optax._storage.quantized import MOMENTS
from galore_optax.codes.affine import QuantizedProjector
from galore_optax.subspace._base import matmul, orthonormalise

# Keys of the state of a `galore`, and of a leaf below it.
Place: TypeAlias = tuple[Keys, Keys]
Pair: TypeAlias = tuple[Matrix, Matrix]  # old and new

# Fields of factored second moments; the others are among `MOMENTS`.
_FACTORS = frozenset(map(GetAttrKey, ("row", "col", "v_row", "v_col")))


def convert_state(
    state: Any,
    old: optax.GradientTransformation,
    new: optax.GradientTransformation,
    params: Any,
) -> Any:
    r"""Turns the state of `old` into one that `new` continues from.

    The two may differ in rank, in how moments are stored (f32, bf16, `quantized` by any
    code) and how projectors are (`projector_dtype`), and in whatever has no part in the
    state, such as `scale`, `update_proj_gap`, `subspace` or the learning rate.
    Counters, random keys and the calendar of refreshes go on.

    A lower rank r' keeps the leading columns of a basis and the moments along them,

    .. math:: P' = P_{:, :r'}, \quad M' = M_{:r', :}, \quad V' = V_{:r', :};

    a higher one keeps all of them and adds orthonormal columns, at random until the
    next refresh finds better ones. First moments along these are zero. Second ones are
    the mean of the others: with zeros, of which the count of steps knows nothing,
    Adam's first steps along new columns would be several times too long.

    Args:
      state: of `old`, as its update returned it.
      old: the transformation that made `state`.
      new: the one to go on with; `galore` in it with the same leaves and sides.
      params: the parameters, or their shapes.

    Returns:
      a state of `new`, to the bit that of `old` where both store the same.
      It may share arrays with `state`: donate only one of them.

    Raises:
      ValueError: `state` is none that `old` makes of `params`, as that of `layerwise`,
        which has a `convert_state` of its own; a leaf is projected by one of the two
        alone, or on another side; one optimizer holds what the other does not. The leaf
        or the array is named.

    Example:
      >>> import galore_optax, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((256, 512))}
      >>> old = galore_optax.galore_adamw(1e-2, rank=32)
      >>> new = galore_optax.galore_adamw8bit(1e-2, rank=16)
      >>> state = galore_optax.convert_state(old.init(params), old, new, params)
      >>> state.inner_state[0].mu["kernel"].codes.shape
      (16, 512)
    """
    before, after = _Made.by(old, params), _Made.by(new, params)
    _check_belongs(before, state)
    conversion = _Conversion(before, after, _pairs(before, after))
    return conversion.of(state)


class _Made(NamedTuple):
    """What a transformation makes of parameters."""

    records: tuple[Recorded, ...]
    state: Any  # abstract
    storage: MomentStorage  # of its moments

    @staticmethod
    def by(tx: optax.GradientTransformation, params: Any) -> "_Made":
        storages: list[MomentStorage] = []
        with within(storages=storages):
            records, state = plans_of(tx, params)
        if any(storage != storages[0] for storage in storages):
            raise ValueError(
                "a transformation holds several `quantized`, with different codes:"
                " which of them stored a moment cannot be told. Give them one code."
            )
        usual = MomentStorage(codes.companded(), MOMENTS)
        return _Made(records, state, (storages or [usual])[0])

    def matrices(self) -> dict[Place, Matrix]:
        """Of projected leaves, by place."""
        found = {}
        for prefix, record in self._placed():
            numbers = record.plan.arrange(range(len(record.plan.projected)))
            for keys, number in jax.tree_util.tree_leaves_with_path(numbers):
                found[prefix, keys] = record.plan.projected[number]
        return found

    def _placed(self) -> list[tuple[Keys, Recorded]]:
        states = galore_states(self.records, self.state)
        pairs, _ = jax.tree_util.tree_flatten_with_path(self.state, is_leaf=is_state)
        return [
            (keys, record)
            for record, found in zip(self.records, states, strict=True)
            for keys, node in pairs
            if node is found
        ]


def _check_belongs(made: _Made, state: Any) -> None:
    wanted, found = _types(made.state), _types(state)
    for keys in [*wanted, *found]:
        if wanted.get(keys) != found.get(keys):
            raise ValueError(
                "the state is none that the old transformation makes of these params:"
                f" '{name(keys)}' is {found.get(keys, 'nothing')}, and should be"
                f" {wanted.get(keys, 'nothing')}. Give the transformation and the"
                " parameters that it was made with."
            )


def _types(state: Any) -> dict[Keys, str]:
    pairs = jax.tree_util.tree_leaves_with_path(state)
    return {unboxed(keys): f"{x.dtype}{list(x.shape)}" for keys, x in pairs}


def _pairs(before: _Made, after: _Made) -> dict[Place, Pair]:
    """Old and new matrix of each projected leaf, checked against each other."""
    old, new = before.matrices(), after.matrices()
    for place in old.keys() ^ new.keys():
        either = (old.get(place) or new[place]).path
        raise ValueError(
            f"'{either}' is projected by {'old' if place in old else 'new'} alone:"
            " a leaf cannot go from coordinates to full size or back. Both need the"
            " same weight_dimension_numbers, a rank that saves something, and the same"
            " transformations around galore."
        )
    for place, matrix in old.items():
        if [x.axes for x in matrix.sides] != [x.axes for x in new[place].sides]:
            raise ValueError(
                f"'{matrix.path}' is projected on another side by new than by old:"
                " coordinates on one tell nothing of the other. Give both the same"
                " proj_type."
            )
    return {place: (old[place], new[place]) for place in old}


@dataclasses.dataclass(frozen=True)
class _Conversion:
    """From the state of one transformation to that of another."""

    before: _Made
    after: _Made
    pairs: Mapping[Place, Pair]

    def of(self, state: Any) -> Any:
        found, treedef = (
            _nodes(state),
            jax.tree.structure(self.after.state, is_leaf=_is_stored),
        )
        old, new = _nodes(self.before.state), _nodes(self.after.state)
        for which, keys in (("new", new.keys() - old), ("old", old.keys() - new)):
            if keys:
                raise ValueError(
                    f"the state of {which} alone holds {few(map(name, keys))}: the"
                    " optimizers differ in more than ranks and storage. Begin a new"
                    " state with new.init(params)."
                )
        projectors = self._projectors()
        return jax.tree.unflatten(
            treedef,
            [
                self._projector(*projectors[keys], found[keys], shape)
                if keys in projectors
                else self._array(keys, found[keys], old[keys], shape)
                for keys, shape in new.items()
            ],
        )

    def _projectors(self) -> dict[Keys, tuple[Matrix, Matrix, int]]:
        """Old and new matrix and the side of each projector, by its keys."""
        found = {}
        for (prefix, leaf), (old, new) in self.pairs.items():
            one = (*prefix, GetAttrKey("projector"), *leaf)
            for side in range(len(old.sides)):
                several = (SequenceKey(side),) if len(old.sides) > 1 else ()
                found[(*one, *several)] = old, new, side
        return found

    @functools.cached_property
    def _by_leaf(self) -> dict[Keys, Pair]:
        return {leaf: pair for (_, leaf), pair in self.pairs.items()}

    def _projector(
        self, old: Matrix, new: Matrix, side: int, stored: Any, shape: Any
    ) -> Any:
        if (old.storage, old.rank) == (new.storage, new.rank):
            return stored
        sizes = old.projector_shape(old.sides[side])
        basis = old.storage.decode(stored, sizes, jnp.dtype(jnp.float32))
        basis = basis.astype(accumulation_dtype(basis))
        matrices = basis.reshape(old.count, -1, old.rank)
        matrices = jax.vmap(lambda p: _with_rank(p, new.rank))(matrices)
        if isinstance(new.storage, Floating):
            return matrices.reshape(shape.shape).astype(shape.dtype)
        encode: Any = new.storage.encode
        coded = jax.vmap(lambda p: encode(p, None))(matrices)
        return jax.tree.map(lambda x, like: x.reshape(like.shape), coded, shape)

    def _array(self, keys: Keys, stored: Any, old: Any, new: Any) -> Any:
        storages = self.before.storage, self.after.storage
        if _alike(old, new) and (not is_coded(new) or storages[0] == storages[1]):
            return stored
        value = storages[0].load(keys, stored) if is_coded(stored) else stored
        if is_coded(new):
            value = self._resized(keys, value, new.codes.shape)
            whole = not storages[1].suits(keys, value.shape)
            value = value.astype(new.codes.dtype) if whole else value
            return storages[1].store(keys, value)
        return self._resized(keys, value, new.shape).astype(new.dtype)

    def _resized(self, keys: Keys, value: Any, shape: tuple[int, ...]) -> jax.Array:
        """With another rank wherever that is what differs."""
        if value.shape == shape:
            return value
        pair = by_end(self._by_leaf, keys)
        ranks = tuple(matrix.rank for matrix in pair) if pair else ()
        if value.ndim == len(shape):
            for axis, sizes in enumerate(zip(value.shape, shape, strict=True)):
                if sizes == ranks:
                    value = self._along(axis, keys, value, sizes[1])
        if value.shape != shape:
            raise ValueError(
                f"'{name(keys)}' is {value.shape} in the state of old and {shape} in"
                " that of new, and not by its rank alone: it cannot be told how to turn"
                " one into the other. Begin a new state with new.init(params)."
            )
        return value

    def _along(self, axis: int, keys: Keys, value: jax.Array, rank: int) -> jax.Array:
        more = rank - value.shape[axis]
        if more <= 0:
            return jax.lax.slice_in_dim(value, 0, rank, axis=axis)
        second = self.before.storage.sign(keys) == "unsigned"
        if second or not _FACTORS.isdisjoint(keys):
            mean = jnp.mean(value, axis, keepdims=True)
        else:
            mean = jnp.zeros_like(jax.lax.slice_in_dim(value, 0, 1, axis=axis))
        return jnp.concatenate([value, jnp.repeat(mean, more, axis)], axis)


def _with_rank(basis: jax.Array, rank: int) -> jax.Array:
    """(m, rank) of an orthonormal (m, r): fewer columns, or orthonormal ones more."""
    size, old = basis.shape
    if rank <= old:
        return basis[:, :rank]
    drawn = jax.random.normal(jax.random.key(0), (size, rank - old), basis.dtype)
    for _ in range(2):  # the first leaves what rounding left of the basis
        drawn = orthonormalise(drawn - matmul(basis, matmul(basis.T, drawn)))
    return jnp.concatenate([basis, drawn], axis=1)


def _is_stored(node: Any) -> bool:
    return is_coded(node) or isinstance(node, QuantizedProjector)


def _nodes(state: Any) -> dict[Keys, Any]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(state, is_leaf=_is_stored)
    return {unboxed(keys): node for keys, node in pairs}


def _alike(one: Any, other: Any) -> bool:
    types = [
        [(x.shape, x.dtype) for x in jax.tree.leaves(node)] for node in (one, other)
    ]
    return is_coded(one) == is_coded(other) and types[0] == types[1]
