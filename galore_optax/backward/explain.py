# SPDX-License-Identifier: Apache-2.0
"""Which gradients are formed, where, and what the products take that make them."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import optax

from galore_optax._asking.record import plans_of
from galore_optax.backward.interpreter import Interpreter
from galore_optax.backward.leaves import weights_of
from galore_optax.backward.renewal import needs_gradients
from galore_optax.backward.source import place_of


@dataclasses.dataclass(frozen=True)
class Use:
    """An operation for which a gradient is formed."""

    primitive: str
    place: str  # file and line of the user's code

    def __str__(self) -> str:
        return f"{self.primitive}, {self.place}"


@dataclasses.dataclass(frozen=True)
class LeafGradient:
    """What becomes of the gradient of one projected leaf."""

    path: str
    products: int  # with the leaf in one pass of the loss; lookups of its rows too
    formed: tuple[Use, ...]  # where its gradient is formed all the same
    flops: int  # a pass, of the products that would make its gradient
    flops_in_coordinates: int  # of those that make its coordinates instead


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One `LeafGradient` a projected leaf, iterable; prints as a table."""

    leaves: tuple[LeafGradient, ...]
    # Subspace methods that need the gradients themselves: with one of these a refresh
    # forms them all, and with none it forms none but those of the uses above.
    formed_to_refresh: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[LeafGradient]:
        return iter(self.leaves)

    @property
    def flops(self) -> int:
        return sum(leaf.flops for leaf in self.leaves)

    @property
    def flops_in_coordinates(self) -> int:
        return sum(leaf.flops_in_coordinates for leaf in self.leaves)

    def __str__(self) -> str:
        total = "", "", _size(self.flops), _size(self.flops_in_coordinates)
        rows = [_HEADER, *map(_row, self.leaves), ("total", *total[1:])]
        uses = [
            f"{leaf.path}: formed for {use}"
            for leaf in self.leaves
            for use in leaf.formed
        ]
        uses += [f"all: formed by a refresh, for {x}" for x in self.formed_to_refresh]
        return "\n".join([*_aligned(rows), *uses])


_HEADER = ("leaf", "gradient", "FLOPs", "in coordinates")


def _row(leaf: LeafGradient) -> tuple[str, ...]:
    formed = f"formed for {len(leaf.formed)} uses" if leaf.formed else "never formed"
    return (
        leaf.path or "(the tree itself)",
        formed if leaf.formed or leaf.products else "zero: not used",
        _size(leaf.flops),
        _size(leaf.flops_in_coordinates),
    )


def _size(number: int) -> str:
    return f"{number:.3g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if place < 2 else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def explain(
    loss: Callable[..., Any],
    tx: optax.GradientTransformation,
    params: Any,
    *args: Any,
    **kwargs: Any,
) -> Explanation:
    """Says whether `value_and_projected_grad` forms the gradient of each leaf.

    Nothing is computed: shapes are enough, of `params` and of `args`.

    Args:
      loss: as for `value_and_projected_grad`; a function of params, with or without
        aux.
      tx: a transformation that contains `galore`, however wrapped.
      params: the parameters, or their shapes.
      *args: what else the loss takes: arrays, their shapes, or anything.
      **kwargs: likewise.

    Returns:
      an `Explanation`; `print` it for a table, iterate over it for the leaves. FLOPs
      are those of one pass in which no conditional is skipped.

    Raises:
      ValueError: `tx` contains no `galore`.

    Example:
      >>> import galore_optax, jax.numpy as jnp, optax
      >>> params = {"up": jnp.ones((64, 256)), "down": jnp.ones((256, 64))}
      >>> def loss(params, x):
      ...     y = jnp.tanh(x @ params["up"]) @ params["down"]
      ...     return jnp.mean(y**2) + 0.1 * jnp.sum(params["down"] ** 2)
      >>> tx = galore_optax.galore(optax.adam(1e-3), rank=8)
      >>> print(galore_optax.explain(loss, tx, params, jnp.ones((32, 64))))
      leaf   gradient             FLOPs  in coordinates
      down   formed for 1 uses 1.05e+06        1.64e+05
      up     never formed      1.05e+06        1.64e+05
      total                     2.1e+06        3.28e+05
      down: formed for integer_pow, ...

    Source: the products are counted from shapes, `2 m n k` each.
    """
    records, state = plans_of(tx, params)
    notes = _Notes()
    given, structure = jax.tree.flatten((args, kwargs))

    def run(params: Any, state: Any, arrays: list[Any]) -> None:
        found = iter(arrays)
        filled = [next(found) if _is_array(x) else x for x in given]
        args, kwargs = jax.tree.unflatten(structure, filled)
        weights = weights_of(tx, state, params).named()
        notes.leaves.update((x.leaf, []) for x in weights.addends if x)
        closed = jax.make_jaxpr(lambda x: loss(weights.tree(x), *args, **kwargs))(
            weights.values
        )
        inputs = weights.inputs(weights.variables())
        interpreter = Interpreter(notes)
        value, *_ = interpreter.jaxpr(closed.jaxpr, closed.consts, inputs)
        interpreter.plain(None, value)

    jax.eval_shape(run, params, state, list(filter(_is_array, given)))
    leaves = tuple(map(notes.report, notes.leaves))
    return Explanation(leaves, tuple(dict.fromkeys(needs_gradients(records))))


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


class _Notes:
    """What an interpreter tells of each leaf while a loss is traced."""

    def __init__(self) -> None:
        self.leaves: dict[str, list[_Product | Use]] = {}
        self._times = 1

    def product(self, leaf: str, before: int, after: int) -> None:
        times = self._times
        self.leaves[leaf].append(_Product(times, times * before, times * after))

    def formed(self, equation: Any, leaf: str) -> None:
        name = equation.primitive.name if equation else "the result"
        self.leaves[leaf].append(Use(name, place_of(equation)))

    @contextlib.contextmanager
    def repeated(self, times: int) -> Iterator[None]:
        before, self._times = self._times, self._times * times
        try:
            yield
        finally:
            self._times = before

    def report(self, leaf: str) -> LeafGradient:
        found = self.leaves[leaf]
        products = [x for x in found if isinstance(x, _Product)]
        uses = dict.fromkeys(x for x in found if isinstance(x, Use))
        total = _Product(*map(sum, zip((0, 0, 0), *products, strict=True)))
        return LeafGradient(leaf, total.times, tuple(uses), total.flops, total.low)


class _Product(NamedTuple):
    times: int
    flops: int
    low: int  # FLOPs in coordinates
