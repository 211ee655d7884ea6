# SPDX-License-Identifier: Apache-2.0
"""A training step, a layer at a time.

one micro-batch     backward pass: gradient -> update -> gone
several             backward passes: gradient -> coordinates, added up
                    then each part: mean coordinates -> update
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from galore_optax._placing.given import check_declared
from galore_optax._placing.state import Placed
from galore_optax._projector.refresh import When
from galore_optax.layerwise._check import refuse_mixing
from galore_optax.layerwise._clip import Clip
from galore_optax.layerwise._parts import Optimizer, Params, Part, by_part, layers_of
from galore_optax.layerwise._places import Places, places_of, refuse_split_layers
from galore_optax.layerwise._sweep import Differentiate, Model, Use, sweep, visit


class Report(NamedTuple):
    """What a step tells."""

    loss: jax.Array  # mean over micro-batches
    # Of the gradient before clipping; of its coordinates where only these are held
    # together: over several micro-batches or under clip_by_projected_norm.
    norm: jax.Array


class Step(NamedTuple):
    """Pure functions, to be compiled by `jax.jit(step.update, donate_argnums=(0, 1))`.

    Without donation the parameters exist twice.
    """

    init: Callable[[Params], Params]  # params -> state of the optimizer
    update: Callable[..., tuple[Params, Params, Report]]
    # (params, state, micro-batches, **extra_args) -> (params, state, report)


def make_step(
    model: Model,
    tx: optax.GradientTransformation,
    *,
    clip: Clip | None = None,
    remat: bool = True,
    form_gradients: bool = True,
) -> Step:
    r"""A training step that holds the gradient of one layer at a time.

    For each layer, from the last to the first,

    .. math:: G_l = \partial L / \partial W_l, \quad
        U_l, s_l = \mathrm{tx}(G_l, s_l, W_l), \quad W_l \leftarrow W_l + U_l,

    and :math:`G_l` is dropped. The numbers are those of `tx.update` on the whole tree,
    to rounding, which in the products of :func:`galore_optax.subspace.power` is that of
    bf16. With several micro-batches the coordinates :math:`P^T G` are added up,
    the bases coming from the first, and there is one update: see `project_gradients`.

    Args:
      model: the model's functions.
      tx: any transformation that treats leaves one by one. It sees a `Params` that
        holds one layer, or the embedding, or the head, so that masks and labels must be
        callables that go by path. On a mesh of several devices `sharded(tx, params)`,
        so that its state is split as they are.
      clip: `clip_by_global_norm(...)`, `clip_by_projected_norm(...)` or nothing.
      remat: keep only the inputs of layers, and compute each layer again for its
        gradient; without it, all that the backward pass of every layer needs is kept.
      form_gradients: if not, those of layers are found in coordinates, as by
        `value_and_projected_grad`: fewer FLOPs, and not even one layer's gradient.
        A refresh takes more passes of its layer.

    Returns:
      `init(params) -> state` and `update(params, state, batches) -> (params, state,
      report)`. Every leaf of `batches` has a leading axis of micro-batches. Further
      arguments of `update` go to that of `tx`, `refresh` of `galore` among them.

    Raises:
      ValueError: without gradients, `remat` is off or they are clipped by their norm;
        from `init`, `tx` needs all gradients at once, or blocks are no stack, or one
        that is split over devices along its layers;
        from `update`, leaves of `batches` without a common leading axis,
        `clip_by_global_norm` or `refresh=True` with several micro-batches.
      TypeError: `tx` is no transformation, `clip` no clipping.

    Example:
      >>> import galore_optax, jax, jax.numpy as jnp, optax
      >>> from galore_optax import layerwise
      >>> model = layerwise.Model(
      ...     embed=lambda params, batch: batch @ params["w"],
      ...     block=lambda params, x, batch: x + jnp.tanh(x @ params["w"]),
      ...     head=lambda params, embed, x, batch: jnp.mean(x**2))
      >>> params = layerwise.Params(
      ...     {"w": jnp.ones((4, 8))}, {"w": jnp.ones((3, 8, 8))}, {})
      >>> only = galore_optax.match_paths({
      ...     "blocks": optax.contrib.MuonDimensionNumbers(1, 2), ".*": None})
      >>> step = layerwise.make_step(model, galore_optax.galore(
      ...     optax.adam(1e-2), rank=2, weight_dimension_numbers=only))
      >>> update = jax.jit(step.update, donate_argnums=(0, 1))
      >>> state = step.init(params)
      >>> params, state, report = update(params, state, jnp.ones((1, 2, 4)))
      >>> report.loss.shape
      ()

    Source: Lv et al., arXiv 2306.09782 (LOMO); arXiv 2403.03507, section 4.3.
    """
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            f"tx={tx!r} is no optax.GradientTransformation. Pass one, such as"
            " galore_optax.galore_adamw8bit(1e-2, rank=1024). For MultiSteps give"
            " batches of several micro-batches instead."
        )
    if not isinstance(clip, Clip | None):
        raise TypeError(
            f"clip={clip!r} is no clipping. Pass"
            " layerwise.clip_by_global_norm(1.0) or None."
        )
    if not form_gradients:
        _check_never_formed(clip, remat)
    placed = tx if isinstance(tx, Placed) else None
    tx = optax.with_extra_args_support(placed.tx if placed else tx)
    places = places_of(placed) if placed else None
    stepper = _Stepper(model, tx, clip, remat, form_gradients, placed, places)
    # Compiled, or the zeros of all moments would exist in f32 before they are coded.
    compiled = jax.jit(stepper.init)

    def init(params: Params) -> Params:
        refuse_split_layers(params)  # while arrays tell where they lie
        return compiled(params)

    return Step(init, stepper.update)


@dataclasses.dataclass(frozen=True)
class _Stepper:
    """The functions of a `Step`."""

    model: Model
    tx: optax.GradientTransformationExtraArgs
    clip: Clip | None
    remat: bool
    form_gradients: bool
    placed: Placed | None  # the transformation, if its parameters were declared
    places: Places | None

    def init(self, params: Params) -> Params:
        if self.placed is not None:
            check_declared(self.placed.given, params)
        refuse_mixing(self.tx, params)
        return self._optimizer(params).init(params)

    def update(
        self, params: Params, state: Params, batches: Any, **extra_args: Any
    ) -> tuple[Params, Params, Report]:
        if not isinstance(state, Params):
            raise TypeError(
                f"the state is a {type(state).__name__}, and not what the init of this"
                " step makes, by layers: step.init(params), not tx.init(params)."
            )
        refuse_split_layers(params)
        count = _micro_batches(batches)
        projected = self.clip is not None and self.clip.projected
        if count > 1 and self.clip and not projected:
            raise ValueError(
                f"clip_by_global_norm with {count} micro-batches would need their mean"
                " gradient at full size. Use clip_by_projected_norm, or one"
                " micro-batch."
            )
        run = self._accumulated if count > 1 or projected else self._fused
        try:
            return self._kept(*run(params, state, batches, extra_args))
        except (IndexError, TypeError, ValueError) as error:
            error.add_note(
                "The first axis of every leaf of batches counts micro-batches, here"
                f" {count}. If these are one batch, give it that axis: x[None]."
            )
            raise

    def _kept(
        self, params: Params, state: Params, report: Report
    ) -> tuple[Params, Params, Report]:
        if self.places is None:
            return params, state, report
        return self.places.keep_params(params), self.places.keep_all(state), report

    def _fused(
        self, params: Params, state: Params, batches: Any, extra_args: dict[str, Any]
    ) -> tuple[Params, Params, Report]:
        """Updates each part as soon as its gradient is there."""
        optimizer = self._optimizer(params)
        batch = jax.tree.map(lambda x: x[0], batches)
        factor = self._factor(self._norm(params, batch)) if self.clip else None

        def use(part: Part, gradient: Any, params: Any, carry: Any) -> Any:
            _, state, _ = carry
            square, gradient = _square(gradient), _scaled(gradient, factor)
            new = optimizer.update(part, gradient, state, params, **extra_args)
            return *new, square

        def differentiate(
            part: Part, value: Any, params: Any, x: Any, carry: Any
        ) -> Any:
            before, state, squares = carry
            refresh = extra_args.get("refresh")
            found = optimizer.differentiate(part, value, params, x, state, refresh)
            return *found[:2], (before, found[2], squares)

        carry = _together(params, state, _zeros(params))
        loss, carry = self._sweep(_first, carry, batch, 1, use, differentiate)
        params, state, squares = _apart(carry)
        return params, state, Report(loss, _root(squares))

    def _norm(self, params: Params, batch: Any) -> jax.Array:
        """Of the gradients, by a backward pass of its own."""

        def use(part: Part, gradient: Any, params: Any, carry: Any) -> Any:
            return _square(gradient)

        zeros = _zeros(params)
        _, squares = sweep(
            self.model, lambda _: params, zeros, batch, 1, use, remat=self.remat
        )
        return _root(squares)

    def _accumulated(
        self, params: Params, state: Params, batches: Any, extra_args: dict[str, Any]
    ) -> tuple[Params, Params, Report]:
        """Adds up coordinates over micro-batches, then updates each part."""
        optimizer = self._optimizer(params)
        count = _micro_batches(batches)
        when = _when(extra_args.get("refresh"), count)
        extra_args = {k: v for k, v in extra_args.items() if k != "refresh"}

        def micro_batch(carry: Params, batch_and_first: Any) -> Any:
            batch, first = batch_and_first
            refresh = when if isinstance(when, bool) else first & when

            def use(part: Part, gradient: Any, params: Any, carry: Any) -> Any:
                state, total = carry
                low, state = optimizer.project(part, gradient, state, params, refresh)
                add = jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, low)
                return state, add

            def differentiate(
                part: Part, value: Any, params: Any, x: Any, carry: Any
            ) -> Any:
                state, total = carry
                found = optimizer.differentiate(part, value, params, x, state, refresh)
                return *found[:2], (found[2], total)

            loss, carry = self._sweep(
                lambda _: params, carry, batch, 1 / count, use, differentiate
            )
            return carry, loss

        carry = _together(state, self._zero_coordinates(optimizer, params, state))
        first = jnp.arange(count) == 0
        carry, losses = lax.scan(micro_batch, carry, (batches, first))
        state, means = _apart(carry)
        norm = optax.tree.norm(means)
        factor = self._factor(norm)

        def update(part: Part, carry: Any) -> Any:
            params, state = carry
            low = _scaled(part.of(means), factor)
            return optimizer.update(
                part, low, state, params, projected=True, **extra_args
            )

        carry = visit(_together(params, state), layers_of(params), update)
        params, state = _apart(carry)
        return params, state, Report(jnp.mean(losses), norm)

    def _sweep(
        self,
        params_in: Callable[[Params], Params],
        carry: Params,
        batch: Any,
        weight: float,
        use: Use,
        differentiate: Differentiate,
    ) -> tuple[jax.Array, Params]:
        return sweep(
            self.model,
            params_in,
            carry,
            batch,
            weight,
            use,
            remat=self.remat,
            differentiate=None if self.form_gradients else differentiate,
        )

    def _factor(self, norm: jax.Array) -> jax.Array | None:
        if self.clip is None:
            return None
        return jnp.where(norm < self.clip.max_norm, 1, self.clip.max_norm / norm)

    def _optimizer(self, params: Params) -> Optimizer:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        return Optimizer(self.tx, shapes, self.places)

    def _zero_coordinates(
        self, optimizer: Optimizer, params: Params, state: Params
    ) -> Params:
        def of(part: Part) -> Any:
            def project(params: Params, state: Params) -> Any:
                mine = part.of(params)
                return optimizer.project(part, mine, part.of(state), mine, False)[0]

            shapes = jax.eval_shape(project, params, state)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, _wide(x)), shapes)

        return by_part(params, of)


def _micro_batches(batches: Any) -> int:
    """How many there are.

    Raises:
      ValueError: leaves disagree; they are named.
    """
    pairs = jax.tree_util.tree_leaves_with_path(batches)
    sizes = {jnp.shape(leaf)[:1] for _, leaf in pairs}
    if len(sizes) != 1 or () in sizes:
        shapes = (f"{jax.tree_util.keystr(k)} {jnp.shape(x)}" for k, x in pairs)
        raise ValueError(
            "every leaf of batches needs the same leading axis of micro-batches, of"
            f" size 1 for a single batch (x[None]); found {', '.join(shapes)}."
        )
    return int(sizes.pop()[0])


def _when(refresh: When, count: int) -> bool | jax.Array:
    """Which refreshes the first of several micro-batches may do."""
    if refresh is True and count > 1:
        raise ValueError(
            f"refresh=True with {count} micro-batches: which of them renews the bases"
            " is decided while they run. Leave refresh out, or refresh with one."
        )
    return jnp.bool_(True) if refresh is None else refresh


def _together(*trees: Params) -> Params:
    """One `Params` whose parts are tuples of the parts of several."""
    return Params(*zip(*trees, strict=True))


def _apart(carry: Params) -> list[Params]:
    return [Params(*parts) for parts in zip(*carry, strict=True)]


def _first(carry: Params) -> Params:
    return _apart(carry)[0]


def _check_never_formed(clip: Clip | None, remat: bool) -> None:
    if clip is not None and not clip.projected:
        raise ValueError(
            "clip_by_global_norm with form_gradients=False: the norm is that of"
            " gradients. Use clip_by_projected_norm."
        )
    if not remat:
        raise ValueError(
            "remat=False with form_gradients=False: a layer runs again with the basis"
            " that its coordinates are found with. Leave remat on."
        )


def _scaled(tree: Any, factor: jax.Array | None) -> Any:
    if factor is None:
        return tree
    return jax.tree.map(lambda x: x * factor.astype(x.dtype), tree)


def _zeros(params: Params) -> Params:
    return by_part(params, lambda part: jnp.zeros(()))


def _wide(x: Any) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _square(gradient: Any) -> jax.Array:
    wide = jax.tree.map(lambda x: x.astype(_wide(x)), gradient)
    return optax.tree.norm(wide, squared=True).astype(jnp.float32)


def _root(squares: Params) -> jax.Array:
    return jnp.sqrt(sum(map(jnp.sum, squares)))
