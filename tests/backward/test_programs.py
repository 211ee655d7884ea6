# SPDX-License-Identifier: Apache-2.0
"""`value_and_projected_grad` of small programs, one operation each.

Each equals `Pᵀ∇` in f64, and forms the gradient where it says it does and nowhere else.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from tests.backward.helpers import assert_equal_ways, normals, uses, x64

X = (5, 6)  # five tokens of six entries


class Case(NamedTuple):
    loss: Callable[..., Any]
    shape: tuple[int, ...]  # of the weight
    x: tuple[int, ...]
    axes: Any  # of the matrix in the weight
    formed: tuple[str, ...]  # for these operations


CASES: dict[str, Case] = {}


def case(
    shape: tuple[int, ...],
    x: tuple[int, ...] = X,
    reduction: Any = 0,
    output: Any = 1,
    formed: tuple[str, ...] = (),
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(loss: Callable[..., Any]) -> Callable[..., Any]:
        axes = MuonDimensionNumbers(reduction, output)
        CASES[loss.__name__] = Case(loss, shape, x, axes, formed)
        return loss

    return add


stack = functools.partial(case, reduction=1, output=2)  # of matrices


def total(y: Any) -> Any:
    """Any function whose gradient differs in every entry."""
    return jnp.sum(jnp.sin(y + 0.3))


@case((6, 10))
def product(w, x):
    return total(x @ w)


@case((6, 10), (5, 10))
def transposed(w, x):
    return total(x @ w.T)


@case((6, 10), (6, 5))
def on_the_left(w, x):
    return total(w.T @ x)


@case((6, 10), (3, 5, 6))
def split_into_heads(w, x):
    return total(jnp.einsum("btd,dhk->bhtk", x, w.reshape(6, 2, 5)))


@case((6, 4, 3), (5, 6), 0, (1, 2))
def heads_of_an_input(w, x):
    return total(jnp.einsum("td,dhk->thk", x, w))


@case((4, 3, 8), (5, 4, 3), (0, 1), 2)
def heads_summed_over(w, x):
    return total(jnp.einsum("thk,hkd->td", x, w))


@case((4, 3, 8), (5, 12), (0, 1), 2)
def merged_heads(w, x):
    return total(x @ w.reshape(12, 8))


@case((4, 3, 8), (5, 3), 1, 2, formed=("reshape",))
def merged_with_a_batch(w, x):
    return total(x @ w.transpose(1, 0, 2).reshape(3, 32))


@case((6, 10))
def cast(w, x):
    return total(x @ w.astype(jnp.float64))


@case((6, 10))
def scaled(w, x):
    return total(x @ (0.5 * w / x[0, 0]))


@case((6, 10))
def new_axes(w, x):
    return total(jnp.einsum("td,adbf->tabf", x, w[None, :, None]))


@case((6, 10))
def repeated_for_each_token(w, x):
    each = jnp.broadcast_to(w, (5, 6, 10))
    return total(jnp.einsum("td,tdf->tf", x, each))


@case((6, 12))
def sliced(w, x):
    return total(x[:, :3] @ w[1:4, 2:11:3])


@case((6, 12))
def cut_in_three(w, x):
    q, k, v = jnp.split(w, 3, axis=1)
    return total((x @ q) * jnp.tanh(x @ k) + x @ v)


@stack((3, 6, 10))
def one_of_a_stack(w, x):
    return total(x @ w[1]) + total(x @ w[jnp.int32(x[0, 0] > 0)])


@stack((3, 6, 10), (3, 5, 6))
def one_matrix_each(w, x):
    return total(jax.vmap(lambda x, w: x @ w)(x, w))


@stack((4, 6, 10), (4, 5, 6))
def experts_summed(w, x):
    return total(jnp.einsum("etd,edf->tf", x, w))


@stack((4, 6, 10))
def experts_side_by_side(w, x):
    return total(jnp.einsum("td,edf->tef", x, w))


@stack((4, 6, 10), (9, 6))
def experts_of_ragged_runs(w, x):
    return total(lax.ragged_dot(x, w, jnp.array([2, 3, 0, 4])))


@case((6, 10), formed=("dot_general",))
def row_by_row(w, x):
    return total(jnp.einsum("td,df->tdf", x, w) + jnp.einsum("td,df->df", x, w))


@case((4, 3, 8), (5, 4), (0, 1), 2, formed=("dot_general",))
def some_heads_summed_over(w, x):
    return total(jnp.einsum("th,hkd->tkd", x, w))


@case((6, 10), (3, 5, 6))
def mapped(w, x):
    return total(jax.vmap(lambda x: jnp.tanh(x @ w))(x))


@case((20, 6))
def tied_embedding(w, x):
    tokens = jnp.abs(100 * x[:, 0]).astype(int) % 20
    beyond = jnp.take(w, tokens + 12, axis=0, mode="fill", fill_value=0.5)
    return (
        total(w[tokens]) + total(jnp.take(w, tokens[::2], axis=0) @ w.T) + total(beyond)
    )


@case((6, 6))
def two_weights(w, x):
    return total(x @ (w @ w.T))


@case((6, 10))
def stopped(w, x):
    return total((x @ lax.stop_gradient(w)) * (x @ w))


@case((6, 10))
def behind_a_barrier(w, x):
    w, x = lax.optimization_barrier((w, x))
    return total(x @ lax.reduce_precision(w, 11, 52))


@stack((3, 6, 6))
def scanned(w, x):
    return total(lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0])


@stack((3, 6, 6))
def scanned_backwards(w, x):
    step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), x))
    return total(lax.scan(step, x, w, reverse=True)[1])


@case((2, 2, 6, 8), X, 2, 3)
def scanned_twice(w, x):
    def inner(x, w):
        return jnp.tanh(x @ w) @ w.T, None

    return total(lax.scan(lambda x, w: (lax.scan(inner, x, w)[0], None), x, w)[0])


@case((6, 6))
def constant_of_a_scan(w, x):
    return total(lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=3)[0])


@case((6, 6))
def carried_along(w, x):
    def step(carry, _):
        x, w = carry
        return (jnp.tanh(x @ w), w), None

    x, w = lax.scan(step, (x, w), length=3)[0]
    return total(x @ w)


@case((6, 6), formed=("scan",))
def changed_along(w, x):
    def step(carry, _):
        x, w = carry
        return (jnp.tanh(x @ w), w * 1.5), None

    return total(lax.scan(step, (x, w), length=3)[0][0])


@stack((3, 6, 6))
def passed_through_a_scan(w, x):
    x, doubled = lax.scan(lambda x, w: (jnp.tanh(x @ w), 2.0 * w), x, w)
    return total(jnp.einsum("td,lde->lte", x, doubled))


@case((6, 8), (6, 3), formed=("mul",))
def scanned_over_rows(w, x):
    def step(sums, row):
        return sums + row[0][:, None] * row[1], None

    return total(lax.scan(step, jnp.zeros((3, 8)), (x, w))[0])


@case((6, 6))
def in_a_loop(w, x):
    return total(lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x))


@case((6, 10))
def in_branches(w, x):
    def once(w):
        return x @ w

    def twice(w):
        return 2 * x @ w

    return total(
        lax.cond(x[0, 0] > 0, once, twice, w) + lax.switch(7, [twice, once], w)
    )


@case((6, 10))
def compiled(w, x):
    return total(jax.jit(lambda w, x: x @ w)(w, x) + jax.jit(jnp.dot)(x, w))


@case((6, 10))
def recomputed(w, x):
    policy = jax.checkpoint_policies.dots_saveable
    return total(jax.checkpoint(lambda w, x: jnp.tanh(x @ w), policy=policy)(w, x))


def _on_devices(loss: Any, *specs: PartitionSpec, check: bool) -> Any:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    return jax.shard_map(
        loss, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=check
    )


@case((6, 10), (4, 6))
def tokens_on_devices(w, x):
    def part(w, x):
        return lax.psum(total(x @ w), "d")

    specs = PartitionSpec(), PartitionSpec("d")
    checked, unchecked = (_on_devices(part, *specs, check=c) for c in (True, False))
    return checked(w, x) + unchecked(w, 2 * x)


@case((6, 10))
def weights_on_devices(w, x):
    def part(w, x):
        return total(lax.psum(x @ w, "d"))

    specs = PartitionSpec("d"), PartitionSpec(None, "d")
    checked, unchecked = (_on_devices(part, *specs, check=c) for c in (True, False))
    return checked(w, x) + unchecked(w, 2 * x)


@case((6, 10), formed=("integer_pow",))
def penalised(w, x):
    return total(x @ w) + 0.1 * jnp.sum(w**2)


@case((6, 10), formed=("concatenate",))
def joined(w, x):
    return total(x @ jnp.concatenate([w, 2 * w], axis=1))


@case((6, 10), formed=("convert_element_type", "argmax"))
def rounded(w, x):
    return total(x @ w) + jnp.sum(w.astype(int)) + jnp.sum(jnp.argmax(w, 0)) * x[0, 0]


@case((6, 10), formed=("while",))
def in_a_while_loop(w, x):
    def double(sums):
        return 2 * sums + jnp.sum(w)

    start = jnp.sum(lax.stop_gradient(w) ** 2)
    end = lax.while_loop(lambda sums: jnp.abs(sums) < 1e3, double, start)
    return total(x @ w) + lax.stop_gradient(end)


@jax.custom_vjp
def _with_a_rule(x, w):
    return x @ w


def _sevenfold(given, dy):
    x, w = given
    return dy @ w.T, 7 * x.T @ dy


_with_a_rule.defvjp(lambda x, w: (x @ w, (x, w)), _sevenfold)


@case((6, 10), formed=("custom_vjp_call",))
def with_a_rule_of_its_own(w, x):
    return total(_with_a_rule(jnp.tanh(x), w))


@jax.custom_jvp
def _with_a_tangent(x, w):
    return x @ w


@_with_a_tangent.defjvp
def _eightfold(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, dx @ w + 8 * x @ dw


@case((6, 10), formed=("custom_jvp_call",))
def with_a_tangent_of_its_own(w, x):
    return total(_with_a_tangent(jnp.tanh(x), w))


@case((6, 10))
def not_used(w, x):
    del w
    return total(x)


@pytest.mark.parametrize("name", CASES)
def test_coordinates_are_those_of_the_gradient(name: str) -> None:
    loss, shape, x_shape, axes, formed = CASES[name]
    with x64():
        w, x = normals(1, w=shape)["w"], normals(2, x=x_shape)["x"]
        chosen = {"weight_dimension_numbers": axes}
        assert_equal_ways(loss, w, x, **chosen)
        assert uses(loss, w, x, proj_type="right", **chosen) == {"": [*formed]}
