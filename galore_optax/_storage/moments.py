# SPDX-License-Identifier: Apache-2.0
"""The moments in an optimizer's state, and the state with all of them stored in a code.

initial     the state that `init` would make, its constants stored without being made
decode      the stored state as the inner made it, boxes included
encode      what the inner made of that, stored again
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from galore_optax._context import current
from galore_optax._placing import rules
from galore_optax._selection.leaves import Placeholder, by_end, in_dtype, is_box
from galore_optax._storage.fill import fills
from galore_optax._xla.sharding import leaf_sharding, place
from galore_optax.codes import Code, Quantized

Path = tuple[Any, ...]
Sign = Literal["signed", "unsigned"]


def is_coded(node: Any) -> bool:
    """Whether `node` is a stored moment."""
    return isinstance(node, Quantized)


def holds_coded(state: Any) -> bool:
    return any(map(is_coded, jax.tree.leaves(state, is_leaf=is_coded)))


def name(path: Path) -> str:
    """For errors."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclasses.dataclass(frozen=True)
class MomentStorage:
    """Which leaves of a state are moments, and how they are stored.

    Every moment becomes a `Quantized`, also those that stay as they are: GaLore
    compares the structures of states for large and small parameters.
    """

    code: Code
    moments: Mapping[str, Sign]

    def sign(self, path: Path) -> Sign | None:
        """That of the innermost field of a path that holds moments."""
        found = [self.moments[key] for key in map(_field, path) if key in self.moments]
        return found[-1] if found else None

    def initial(self, init: Callable[[Any], Any], params: Any) -> Any:
        """`init(params)`, its moments stored."""
        # A new function each time: JAX would remember the shapes, and trace no more.
        closed, shapes = jax.make_jaxpr(lambda tree: init(tree), return_shape=True)(
            params
        )
        pairs, treedef = _flatten(shapes, is_box)
        like, numbers = _nodes_by_path(params), fills(closed)
        slots = [
            _Slot(self, path, node, number, _like(like, path, _content(node).shape))
            for (path, node), number in zip(pairs, numbers, strict=True)
        ]
        computed = _computed(closed, slots, jax.tree.leaves(params))
        return treedef.unflatten(
            [computed[i] if i in computed else x.filled() for i, x in enumerate(slots)]
        )

    def unlabelled(self, state: Any) -> Any:
        """For `optax.tree.map_params`: stored moments are not shaped like params."""

        def one(path: Path, x: Any) -> Any:
            return jnp.zeros([]) if self.sign(path) else x

        def is_leaf(x: Any) -> bool:
            return isinstance(x, Placeholder)

        return jax.tree_util.tree_map_with_path(one, state, is_leaf=is_leaf)

    def decode(self, state: Any, updates: Any) -> Any:
        """The state of the inner, up to rounding, in the boxes of `updates`."""
        boxes = {p: x for p, x in _nodes_by_path(updates).items() if is_box(x)}

        def one(path: Path, x: Any) -> Any:
            if not is_coded(x):
                return x
            # Around an array of another shape there was none.
            box, moment = _like(boxes, path, x.codes.shape), self.load(path, x)
            return moment if box is None else _rebox(box, moment)

        return jax.tree_util.tree_map_with_path(one, state, is_leaf=is_coded)

    def encode(self, state: Any, stored: Any) -> Any:
        """A state of the inner, stored as `stored` is."""
        pairs, treedef = _flatten(stored, is_coded)
        nodes = treedef.flatten_up_to(state)
        return treedef.unflatten(
            [
                self.store_as(old, path, _content(node)) if is_coded(old) else node
                for (path, old), node in zip(pairs, nodes, strict=True)
            ]
        )

    def widened(self, tree: Any, like: Any) -> Any:
        """`tree` in the dtypes that its moments have once they are decoded.

        f32 at least where they are coded; else those of `like`, the parameters, which
        the moments have had since `init`.
        """

        def one(path: Path, x: Any, param: Any) -> Any:
            if not jnp.issubdtype(x.dtype, jnp.floating):
                return x
            coded = self.suits(path, x.shape)
            return in_dtype(x, jnp.float32 if coded else param.dtype)

        return jax.tree_util.tree_map_with_path(one, tree, like)

    def suits(self, path: Path, shape: tuple[int, ...]) -> bool:
        """Whether the moment at `path` is coded, or kept as it is."""
        try:
            return self.code.suits(shape)
        except ValueError as error:
            raise ValueError(f"'{name(path)}': {error}") from None

    def store(self, path: Path, x: jax.Array) -> Quantized:
        """The moment `x` at `path`, stored."""
        if not self.suits(path, x.shape):
            return _whole(x)
        return _encode(self.code, x.astype(jnp.float32), self.sign(path) == "signed")

    def store_as(self, old: Quantized, path: Path, x: jax.Array) -> Quantized:
        """The moment `x` at `path`, stored as `old` was."""
        if self.suits(path, x.shape):
            return self.store(path, x)
        return Quantized(x, old.scales.astype(x.dtype))  # 1, without one more array

    def load(self, path: Path, stored: Quantized) -> jax.Array:
        """The moment at `path`, decoded."""
        shape = tuple(stored.codes.shape)
        if not self.suits(path, shape):
            if stored.scales.shape != ():
                wanted = _whole(jax.ShapeDtypeStruct(shape, jnp.float32))
                raise ValueError(self._other_code(path, stored, wanted))
            return stored.codes
        signed = self.sign(path) == "signed"
        wanted = _form(self.code, shape, signed)
        if any(_type(x) != _type(y) for x, y in zip(stored, wanted, strict=True)):
            raise ValueError(self._other_code(path, stored, wanted))
        return _decode(self.code, stored, signed)

    def _other_code(self, path: Path, stored: Quantized, wanted: Quantized) -> str:
        return (
            f"the state of '{name(path)}' was stored under another code:"
            f" {_sizes(stored)} where {self.code!r} makes {_sizes(wanted)}. Restore"
            " it with the code it was saved with, or begin a new state with"
            " tx.init(params)."
        )


@dataclasses.dataclass(frozen=True)
class _Slot:
    """A leaf of a state that does not exist yet."""

    storage: MomentStorage
    path: Path
    node: Any  # abstract: an array, or a box around one
    number: np.ndarray | None  # that fills it
    param: Any  # the parameter of its path and shape, boxed likewise, or None

    @property
    def is_moment(self) -> bool:
        floating = jnp.issubdtype(_content(self.node).dtype, jnp.floating)
        return self.storage.sign(self.path) is not None and floating

    def stored(self, value: jax.Array) -> Any:
        """As it is in the state, from its value."""
        if self.is_moment:
            return self.storage.store(self.path, value)
        return _rebox(self.node, value)

    def filled(self) -> Any:
        """As it is in the state, without its value where that is zero and coded."""
        shape, number = _content(self.node).shape, self.number
        if not self.is_moment or not self.storage.suits(self.path, shape):
            return self.stored(self._full())
        signed = self.storage.sign(self.path) == "signed"
        if number:
            return _encode_full(self.storage.code, shape, signed, number)
        code = self.storage.code
        if current().only_read:  # traced again and again, and never run
            return _beside(self._like, _zeros(code, shape, signed))
        return _beside(self._like, code.zeros(shape, signed))

    @property
    def _like(self) -> Any:
        return None if self.param is None else _content(self.param)

    def _full(self) -> jax.Array:
        aval = _content(self.node)
        # NumPy's: an array of JAX would lie on one device, and the result with it.
        number = np.asarray(self.number, aval.dtype)[()]
        if self._like is None:
            return jax.lax.full(aval.shape, number, aval.dtype)
        return jnp.full_like(self._like, number, aval.dtype)


def _computed(
    closed: core.ClosedJaxpr, slots: list[_Slot], inputs: list[Any]
) -> dict[int, Any]:
    """What no number fills, by place, as it is in the state."""
    places = [i for i, slot in enumerate(slots) if slot.number is None]
    if not places:
        return {}

    def compute(values: list[Any]) -> list[Any]:
        outputs = core.jaxpr_as_fun(closed)(*values)
        return [slots[i].stored(outputs[i]) for i in places]

    # Compiled, so that nothing else of the state is computed.
    return dict(zip(places, jax.jit(compute)(inputs), strict=True))


@functools.lru_cache(maxsize=1024)
def _form(code: Code, shape: tuple[int, ...], signed: bool) -> Any:
    """Shapes and dtypes of a coded array."""
    return jax.eval_shape(lambda: code.zeros(shape, signed))


# Compiled by themselves so that all leaves of one shape are traced once.
@functools.partial(jax.jit, static_argnums=(0, 2))
def _encode(code: Code, x: jax.Array, signed: bool) -> Quantized:
    return code.encode(x, signed)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _decode(code: Code, stored: Quantized, signed: bool) -> jax.Array:
    return code.decode(stored, signed)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(code: Code, shape: tuple[int, ...], signed: bool) -> Quantized:
    return code.zeros(shape, signed)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _encode_full(
    code: Code, shape: tuple[int, ...], signed: bool, number: Any
) -> Quantized:
    # Behind a barrier, or XLA would encode while it compiles, slowly.
    number = jax.lax.optimization_barrier(jnp.asarray(number, jnp.float32))
    return code.encode(jnp.full(shape, number), signed)


def _whole(x: Any) -> Quantized:
    return Quantized(x, jnp.ones((), x.dtype))


def _type(x: Any) -> tuple[Any, ...]:
    return x.dtype, tuple(x.shape)


def _sizes(stored: Quantized) -> str:
    parts = [f"{key} {x.dtype}{list(x.shape)}" for key, x in stored._asdict().items()]
    return ", ".join(parts)


def _field(key: Any) -> str:
    return str(getattr(key, "name", ""))


def _content(node: Any) -> Any:
    """The array in a box, or the array."""
    return jax.tree.leaves(node)[0]


def _rebox(node: Any, value: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(node), [value])


def _nodes_by_path(tree: Any) -> dict[Path, Any]:
    return dict(_flatten(tree, is_box)[0])


def _flatten(
    tree: Any, is_leaf: Callable[[Any], bool]
) -> tuple[list[tuple[Path, Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)


def _like(nodes: dict[Path, Any], path: Path, shape: tuple[int, ...]) -> Any:
    """The node of this shape whose path is the end of `path`, as a parameter's is."""
    node = by_end(nodes, path)
    return None if node is None or jnp.shape(_content(node)) != shape else node


def _beside(like: Any, zeros: Quantized) -> Quantized:
    """Zeros where `like` lies, as far as whole blocks do."""
    sharding = None if like is None else leaf_sharding(like)
    if sharding is None:
        return zeros
    return jax.tree.map(place, zeros, rules.coded(sharding, *zeros))
