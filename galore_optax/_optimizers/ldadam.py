# SPDX-License-Identifier: Apache-2.0
"""LDAdam: a basis a step, moments that turn with it, and errors fed back."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import optax

from galore_optax._config import Config, Projection
from galore_optax._context import current
from galore_optax._galore import config_of, with_defaults, with_projection
from galore_optax._inner.eager import compiled
from galore_optax._optimizers._descent import descent
from galore_optax._projector.project import accumulation_dtype, lift, project
from galore_optax._projector.refresh import When
from galore_optax._selection.leaves import Placeholder
from galore_optax._selection.matrices import Plan
from galore_optax._state import GaLoreState, check_type, read
from galore_optax._transform import projected as projecting
from galore_optax._transform import refuse_coordinates, renew
from galore_optax._types import Scalar
from galore_optax._xla.sharding import sharding_of
from galore_optax.moments import rotate
from galore_optax.subspace import power

_LDADAM = {
    "rank": 16,
    "update_proj_gap": 1,
    "scale": 1.0,
    "subspace": power(steps=1),
    "moments": rotate(),
}


class LDAdamState(NamedTuple):
    """State of `ldadam`, before its weight decay and its learning rate.

    Example:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.ldadam(1e-3, rank=4)
      >>> state = tx.init({"kernel": jnp.ones((16, 64)), "bias": jnp.ones(64)})[0]
      >>> state.error["kernel"].shape, state.error["bias"]
      ((16, 64), MaskedNode())
    """

    galore: GaLoreState
    error: Any  # like params: what updates lacked so far; () where it is not fed back


@functools.partial(with_projection, defaults=_LDADAM)
def ldadam(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Scalar = 0.908,
    b2: Scalar = 0.99,
    eps: Scalar = 1e-8,
    weight_decay: Scalar = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    rho: Scalar = 0.908,
    error_feedback: bool = True,
    **projection: Unpack[Projection],
) -> optax.GradientTransformationExtraArgs:
    r"""Adam in a subspace that follows momentum and gradient at every step.

    With e the error so far and hats for moments without their bias,

    .. math:: A = G + e, \quad P' = \mathrm{subspace}(\rho\, P \hat M + (1 - \rho) A),
        \quad M, V \leftarrow \mathrm{moments}(P'^T P), \quad
        N = \mathrm{adam}(P'^T A), \\
        e' = A - P' P'^T A + \frac{b_1}{1 - b_1} (P M_{before} - P' M_{turned}),
        \quad W \leftarrow W - lr\,(\mathrm{scale} \cdot P' N + wd\, W).

    The error is an array of the size and dtype of each projected leaf: with it, the
    state is larger than the memory that a projection saves on one moment. It needs
    whole gradients, fed back or not.

    Args:
      learning_rate: number or schedule; published with 1e-3.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, multiplied by the learning rate and not by `scale`.
      mask: which leaves decay, as in `optax.adamw`; paths are those of params.
      rho: share of the momentum in what the basis is found from.
      error_feedback: whether what an update lacks is added to the next gradient.
      **projection: `rank` and all else that `galore` takes. If not given, `rank` is 16,
        `update_proj_gap` 1, `scale` 1, `subspace` is `subspace.power(steps=1)` and
        `moments` `moments.rotate()`.

    Returns:
      the transformation; its state is a tuple whose first entry is an `LDAdamState`.

    Raises:
      TypeError: `mask` is one value; `error_feedback` is no bool; and as `galore`.
      ValueError: errors are fed back and the subspace is not orthonormal, or `init` is
        called layer by layer, where an array of that size would be kept for each
        layer; and as `galore`.

    Example:
      >>> import galore_optax, jax.numpy as jnp
      >>> tx = galore_optax.ldadam(1e-3, rank=4, error_feedback=False)
      >>> state = tx.init({"kernel": jnp.ones((16, 64))})

    Source: Robert et al., LDAdam, arXiv 2410.16103, Algorithm 1.
    """
    config = config_of(with_defaults(_LDADAM, projection))
    _check_feedback(error_feedback, config)
    what = f"ldadam(error_feedback={error_feedback})"
    config = dataclasses.replace(config, needs_whole=what)
    inner = optax.scale_by_adam(b1, b2, eps)
    rule = _LDAdam(config, inner, b1, rho, error_feedback)
    low = compiled(optax.GradientTransformationExtraArgs(rule.init, rule.update))
    return descent(low, config, learning_rate, weight_decay, mask)


def _check_feedback(error_feedback: Any, config: Config) -> None:
    if not isinstance(error_feedback, bool):
        raise TypeError(f"error_feedback={error_feedback!r} must be True or False.")
    if error_feedback and not config.subspace.orthonormal:
        raise ValueError(
            "error_feedback=True takes A - P PᵀA for what an update lacks, and bases of"
            f" {config.subspace!r} are not orthonormal. Use another subspace, or"
            " error_feedback=False."
        )


@dataclasses.dataclass(frozen=True)
class _LDAdam:
    config: Config
    inner: optax.GradientTransformation
    b1: Scalar
    rho: Scalar
    feedback: bool

    @functools.cached_property
    def galore(self) -> optax.GradientTransformationExtraArgs:
        return projecting(lambda plan: self.inner, self.config)

    def init(self, params: Any) -> LDAdamState:
        if self.feedback and current().whole is not None:
            raise ValueError(
                "ldadam(error_feedback=True) keeps an array of the size of a gradient"
                " for every layer, and layer by layer there is to be no more than one."
                " Use error_feedback=False, or the plain step."
            )
        state = self.galore.init(params)
        if not self.feedback:
            return LDAdamState(state, ())
        if isinstance(params, Placeholder):
            return LDAdamState(state, jnp.zeros([]))
        plan = self.config.selection.plan(params)
        zeros = [jnp.zeros_like(leaf) for _, leaf in plan.pairs()]
        return LDAdamState(state, plan.arrange(zeros))

    def update(
        self,
        updates: Any,
        state: LDAdamState,
        params: Any = None,
        *,
        refresh: When = None,
        projected: bool = False,
        **extra_args: Any,
    ) -> tuple[Any, LDAdamState]:
        if projected:
            refuse_coordinates(self.config)
        _check_state(state)
        plan = self.config.selection.plan(updates)
        fed = self._fed(plan, state.error)
        momentum = _lifted(plan, state.galore)
        basis = _with(plan, self._evidence(fed, momentum, state.galore))
        turned = renew(basis, self.config, self.inner, state.galore, refresh)
        whole = _tree(plan, fed)
        found, after = self.galore.update(
            whole, turned, params, refresh=False, **extra_args
        )
        if not self.feedback:
            return found, LDAdamState(after, ())
        errors = self._errors(plan, fed, momentum, turned)
        return found, LDAdamState(after, _stored_as(plan, state.error, errors))

    def _fed(self, plan: Plan, error: Any) -> list[jax.Array]:
        """`A = G + e` of each projected leaf, f32 at least."""
        gradients = [x.astype(accumulation_dtype(x)) for _, x in plan.pairs()]
        if not self.feedback:
            return gradients
        errors = plan.read(error)
        return [x + e.astype(x.dtype) for x, e in zip(gradients, errors, strict=True)]

    def _evidence(
        self, fed: Sequence[jax.Array], momentum: Sequence[jax.Array], state: Any
    ) -> list[jax.Array]:
        """What a basis is found from."""
        kept = 1 - jnp.asarray(self.b1) ** state.count
        share = self.rho / jnp.where(state.count > 0, kept, 1)
        return [
            share.astype(a.dtype) * m.astype(a.dtype) + (1 - self.rho) * a
            for a, m in zip(fed, momentum, strict=True)
        ]

    def _errors(
        self,
        plan: Plan,
        fed: Sequence[jax.Array],
        momentum: Sequence[jax.Array],
        state: GaLoreState,
    ) -> list[jax.Array]:
        """What the update of `fed` lacks, `state` having its bases and turned moments.

        By `P'(P'ᵀA + c M)`, one product lifts both parts.
        """
        ratio, errors = self.b1 / (1 - self.b1), []
        moments = plan.read(state.inner_state.mu)
        sides = zip(plan.projected, read(plan, state), strict=True)
        for (matrix, bases), a, before, m in zip(
            sides, fed, momentum, moments, strict=True
        ):
            low = project(matrix, bases, a)
            low = low + ratio * m.astype(low.dtype)
            gradient = plan.flat.values[matrix.position]
            inside = lift(matrix, bases, low, sharding_of(matrix.path, gradient))
            errors.append(a + ratio * before.astype(a.dtype) - inside)
        return errors


def _check_state(state: Any) -> None:
    if not isinstance(state, LDAdamState):
        check_type(state)
        raise ValueError(
            "update of ldadam was given a GaLoreState of another optimizer. Call init"
            " of ldadam with the parameters that are being trained."
        )
    check_type(state.galore)


def _lifted(plan: Plan, state: GaLoreState) -> list[jax.Array]:
    """`P M` of each projected leaf."""
    return [
        lift(matrix, bases, m, sharding_of(matrix.path, gradient))
        for (matrix, gradient), bases, m in zip(
            plan.pairs(),
            read(plan, state),
            plan.read(state.inner_state.mu),
            strict=True,
        )
    ]


def _with(plan: Plan, values: Sequence[jax.Array]) -> Plan:
    """`plan` with other gradients of the projected leaves."""
    nodes = list(plan.flat.nodes)
    for matrix, value in zip(plan.projected, values, strict=True):
        nodes[matrix.position] = value
    return plan.with_values(tuple(nodes))


def _tree(plan: Plan, values: Sequence[jax.Array]) -> Any:
    """As the gradients are, boxes included."""
    found = _with(plan, values).flat.values
    return plan.flat.rebuild(found, [True] * len(found))


def _stored_as(plan: Plan, old: Any, new: Sequence[jax.Array]) -> Any:
    pairs = zip(new, plan.read(old), strict=True)
    return plan.arrange(x.astype(like.dtype) for x, like in pairs)
